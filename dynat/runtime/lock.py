"""``dvc.lock`` as data: what each stage ran with and what it made.

Read with libyaml, as DVC's own reader takes seconds for a long one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynat.config.yaml_files import parse as parse_yaml
from dynat.errors import UserError

LOCK = "dvc.lock"


def read_lock(root: Path) -> dict[str, Any]:
    """Stage name -> entry of ``dvc.lock``; empty if nothing was run, :class:`UserError` if it is broken."""
    try:
        return parse_lock((root / LOCK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{LOCK}: cannot be read ({reason}); restore it with git checkout") from None


def parse_lock(text: str) -> dict[str, Any]:
    """The stages of a ``dvc.lock``."""
    content = parse_yaml(text) or {}
    stages = content.get("stages", {})
    for name, entry in stages.items():
        if not isinstance(name, str):
            raise ValueError(f"the name of stage {name}")
        for kind in ("deps", "outs"):
            locked(entry, kind)
        if not isinstance(locked_params(entry), dict):
            raise ValueError(f"params of {name}")
    return dict(stages)


def locked(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Path -> hash of the ``deps`` or ``outs`` of a lock entry."""
    return {str(each["path"]): str(each.get("md5", "")) for each in entry.get(kind, [])}


def locked_params(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of the parameters of a lock entry."""
    values: dict[str, Any] = {}
    for each in entry.get("params", {}).values():
        values |= each
    return values
