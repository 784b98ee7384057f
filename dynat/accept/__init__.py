"""An edit that should change no result, accepted by proof instead of by training again (docs/audit.md)."""
