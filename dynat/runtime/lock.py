"""``dvc.lock`` as data: what each stage ran with and what it made.

Read with libyaml, as DVC's own reader takes seconds for a long one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynat.config.yaml_files import parse as parse_yaml
from dynat.runtime.files import read

LOCK = "dvc.lock"


def read_lock(root: Path) -> dict[str, Any]:
    """Stage name -> entry of ``dvc.lock``; empty if nothing was run, :class:`UserError` if it is broken."""
    return read(root, LOCK, _parse) or {}


def _parse(text: str) -> dict[str, Any]:
    try:
        stages = dict((parse_yaml(text) or {}).get("stages", {}))
        for name, entry in stages.items():
            if not isinstance(name, str):
                raise TypeError(name)
            for kind in ("deps", "outs"):
                locked(entry, kind)
            locked_params(entry)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not as DVC writes it: {error!r}") from None
    return stages


def locked(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Path -> hash of the ``deps`` or ``outs`` of a lock entry."""
    return {str(each["path"]): str(each.get("md5", "")) for each in entry.get(kind, [])}


def locked_params(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of the parameters of a lock entry."""
    values: dict[str, Any] = {}
    for each in entry.get("params", {}).values():
        values |= each
    return values
