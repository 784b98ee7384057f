"""Which stages nothing but their code has made stale."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dvc.stage import PipelineStage

from dynat.audit.lineage import Lineage
from dynat.errors import UserError
from dynat.runtime.closure import closure_file, code_key
from dynat.runtime.lock import locked


class Stale(NamedTuple):
    """A stage of which dvc.lock names other code than there is."""

    name: str
    kind: str  # its script: prepare, train, attack, autoattack, tabulate
    setting: str | None
    method: str | None
    seed: int | None
    code: str  # MD5 of the closure that it ran with
    outs: dict[str, str]  # path -> MD5 in dvc.lock


def select(lineage: Lineage, wanted: Iterable[str]) -> list[Stale]:
    """The stages of ``wanted`` (all without one) that ran with other code.

    Raises :class:`UserError` for a name that is no stage, and for a stage that something else changed too.
    """
    names = list(lineage.stages)
    for each in wanted:
        if not any(each in (name, name.partition("@")[0]) for name in names):
            raise UserError(f"{each}: no stage of dvc.yaml; dvc status lists those that are stale")
    chosen = {name for name in names for each in wanted if each in (name, name.partition("@")[0])} or {*names}
    found = []
    for name in names:
        stage, entry = lineage.stages[name], lineage.lock.get(name)
        script = re.search(r" -m stages\.(\w+)(?: (\S+))?(?: (\S+) (\d+))?$", str(stage.cmd))
        if name not in chosen or entry is None or script is None or script[1] == "check":
            continue
        code = locked(entry, "deps").get(closure_file(script[1]).as_posix(), "")
        if code == code_key(script[1]):
            continue
        with lineage.repo.lock:
            reasons = list(_other_changes(stage, script[1]))
        for reason in reasons:
            raise UserError(f"{name}: {reason}; run dvc repro")
        seed = int(script[4]) if script[4] else None
        found.append(Stale(name, script[1], script[2], script[3], seed, code, locked(entry, "outs")))
    return found


def _other_changes(stage: PipelineStage, kind: str) -> Iterator[str]:
    """What differs from dvc.lock beside the code, from DVC's own view of the stage."""
    for change in stage.status().get(stage.addressing, []):
        if not isinstance(change, dict):
            yield str(change)
            continue
        for what, paths in change.items():
            for path, state in paths.items():
                if path != closure_file(kind).as_posix():
                    yield f"{what.removeprefix('changed ').removesuffix('s')} {path} is {_words(state)}"


def _words(state: Any) -> str:
    if isinstance(state, dict):  # parameters of a file
        return ", ".join(f"{word} ({key})" for key, word in state.items())
    return {"deleted": "not here (dvc checkout or dvc pull brings it)"}.get(state, str(state))
