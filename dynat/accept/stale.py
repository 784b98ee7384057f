"""Which stages nothing but their code has made stale."""

import re
from collections.abc import Collection
from typing import NamedTuple

from dynat.audit.lineage import Lineage
from dynat.errors import UserError
from dynat.runtime.closure import closure_file, code_key
from dynat.runtime.lock import locked

SCRIPT = re.compile(r" -m stages\.(?!check)(\w+)(?: (\S+))?(?: (\S+) (\d+))?$")


class Stale(NamedTuple):
    """A stage of which dvc.lock names other code than there is."""

    name: str
    kind: str  # its script: prepare, import, train, attack, autoattack, tabulate
    setting: str | None
    method: str | None
    seed: int | None
    code: str  # MD5 of the closure that it ran with
    outs: list[str]

    @property
    def run(self) -> str:
        """Setting, method and seed, as paths have them."""
        return f"{self.setting}/{self.method}/{self.seed}"


def select(lineage: Lineage, wanted: Collection[str]) -> list[Stale]:
    """The stages of ``wanted`` (all without one) that ran with other code.

    Raises :class:`UserError` for a name that is no stage, and for a stage that something else changed too.
    """
    groups = {name: name.partition("@")[0] for name in lineage.stages}
    for each in {*wanted} - {*groups, *groups.values()}:
        raise UserError(f"{each}: no stage of dvc.yaml; dvc status lists those that are stale")
    found = []
    for name, stage in lineage.stages.items():
        script, entry = SCRIPT.search(str(stage.cmd)), lineage.lock.get(name)
        if script is None or entry is None or (wanted and not {name, groups[name]} & {*wanted}):
            continue
        closure = closure_file(script[1]).as_posix()
        code = locked(entry, "deps").get(closure, "")
        if code == code_key(script[1]):
            continue
        with lineage.repo.lock:
            changes = stage.status().get(name, [])
        for change in changes:  # as DVC itself tells them
            if not isinstance(change, dict):
                raise UserError(f"{name}: {change}; run dvc repro")
            states = {path: state for paths in change.values() for path, state in paths.items()}
            for path in states.keys() - {closure}:
                raise UserError(f"{name}: {path} is {states[path]}; run dvc repro, or dvc checkout")
        seed = int(script[4]) if script[4] else None
        found.append(Stale(name, script[1], script[2], script[3], seed, code, [*locked(entry, "outs")]))
    return found
