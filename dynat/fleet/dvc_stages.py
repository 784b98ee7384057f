"""The stages of dvc.yaml as DVC has them. The only module that uses DVC's internals, those of 3.67.

A stage is recorded as ``dvc repro`` records one that it finds in its run cache. Whoever runs a stage puts it
there, which takes no lock: the cache's files are renamed into place. The driver alone writes ``dvc.lock``.
``tests/fleet/test_dvc_stages.py`` says by name what another version of DVC has changed.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from dvc.exceptions import DvcException
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.rwlock import rwlock
from dvc.stage import PipelineStage
from dvc.stage.cache import RunCacheNotFoundError
from dvc.utils.serialize import loads_yaml, modify_yaml
from dvc_data.hashfile.hash_info import HashInfo

from dynat.audit.history import git
from dynat.audit.link import one_line
from dynat.errors import UserError
from dynat.runtime.files import digest
from dynat.runtime.lock import LOCK

OPENING_TRIES, OPENING_S = 20, 0.5
State = Literal["unchanged", "cached", "to run"]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what DVC raises into a :class:`UserError` that names ``what``."""
    try:
        yield
    except DvcException as error:
        raise UserError(f"{what}: {one_line(error, 500)}") from None


class StageFiles:
    """One stage: its command, what it reads and writes, DVC's run cache for it."""

    def __init__(self, stage: PipelineStage) -> None:
        self.stage = stage
        self.name: str = stage.addressing
        command = stage.cmd
        self.command: str = command if isinstance(command, str) else " && ".join(command)
        self.meta: dict[str, Any] = stage.meta or {}
        self.outputs = [str(out) for out in stage.outs]

    @classmethod
    def open(cls, root: Path, name: str) -> "StageFiles":
        """The stage ``name`` as this process sees it, without a lock."""
        for tries in range(OPENING_TRIES):
            try:
                (stage,) = Repo(root).stage.collect(name)
                return cls(stage)
            except DvcException as error:  # DVC writes dvc.lock in place: it may have been read half written
                if tries + 1 == OPENING_TRIES:
                    raise UserError(f"{name}: {one_line(error, 500)}") from None
                time.sleep(OPENING_S)
        raise AssertionError

    @property
    def kept(self) -> bool:
        """Whether DVC keeps runs of it in the run cache: not of a stage with persistent outputs."""
        return not any(out.persist for out in self.stage.outs)

    def dependencies(self) -> dict[str, Any]:
        """Path -> hash of each dependency now, "command" -> the command; UserError if one is missing."""
        with explained(self.name):
            if self.stage.changed_stage() or not self.stage.deps_cached():
                self.forget_outputs()
            self.stage.save_deps()
        found = {str(dep): dep.hash_info.value for dep in self.stage.deps}
        value: dict[str, Any] = json.loads(json.dumps({**found, "command": self.command}))
        return value

    def forget_outputs(self) -> None:
        """Forget the hashes that dvc.lock has: DVC would take these outputs for those of the run at hand."""
        for out in self.stage.outs:
            out.hash_info = HashInfo()

    def cached(self) -> bool:
        """Whether DVC has what this command makes of :meth:`dependencies`, which must come first."""
        try:
            self.stage.repo.stage_cache.restore(self.stage, dry=True)
        except RunCacheNotFoundError:
            return False
        return True

    def save(self) -> None:
        """Put the outputs into DVC's cache and the run into the run cache.

        Raises :class:`UserError` if an output is missing; OSError where the disk is full.
        """
        with explained(self.name):
            self.stage.save_outs()
            if self.kept:
                for out in self.stage.outs:
                    out.commit(relink=False)
                self.stage.repo.stage_cache.save(self.stage)


def changed(planned: dict[str, Any], now: dict[str, Any]) -> str:
    """The names of what differs."""
    return ", ".join(key for key in now if now[key] != planned.get(key))


def key_of(dependencies: dict[str, Any]) -> str:
    """What names a run: a hash of everything that it depends on."""
    return digest(dependencies)


class Pipeline:
    """What ``dvc repro TARGETS`` would do, for the one process that may write ``dvc.lock``."""

    def __init__(self, root: Path, targets: Sequence[str]) -> None:
        self.root = root
        logging.getLogger("dvc").setLevel(logging.WARNING)  # a line for each stage and each write of the lock
        with explained("dvc.yaml"):
            self.repo = Repo(root, _wait_for_lock=True)
            with lock_repo(self.repo):
                graph = get_active_graph(self.repo.index.graph)
                stages = plan_repro(graph, collect_stages(self.repo, targets or ["dvc.yaml"]))
        self.stages = {stage.addressing: StageFiles(stage) for stage in stages if stage.cmd}
        for stage in stages:
            if stage.addressing not in self.stages or stage.frozen:
                raise UserError(f"{stage.addressing}: only stages with a command, not frozen, run in a fleet")
        self._above = {stage.addressing: list(graph.successors(stage)) for stage in stages}
        self.upstream = {
            name: {above.addressing for above in self._above[name]} & self.stages.keys()
            for name in self.stages
        }
        self._held: dict[str, ExitStack] = {}

    def state(self, name: str) -> State:
        """What ``dvc repro`` would do with a stage now; changes nothing."""
        each = self.stages[name]
        with explained(name), lock_repo(self.repo):
            if not each.stage.changed(upstream=self._above[name]):
                return "unchanged"
            each.dependencies()  # the run cache is asked for these
            return "cached" if each.cached() else "to run"

    def begin(self, name: str, done: bool) -> dict[str, Any]:
        """Make way for a run: lock its files for DVC, remove the old outputs unless the run is ``done``.

        Returns what the stage depends on. ``dvc repro`` of a held stage is refused until :meth:`release`.
        """
        each = self.stages[name]
        with explained(name), lock_repo(self.repo):
            planned = each.dependencies()
            held = ExitStack()
            reads, writes = ([item.fs_path for item in of] for of in (each.stage.deps, each.stage.outs))
            held.enter_context(
                rwlock(self.repo.tmp_dir, self.repo.fs, " ".join(sys.argv), reads, writes, False)
            )
            self._held[name] = held
            each.forget_outputs()
            if not done:
                each.stage.remove_outs()
        return planned

    def release(self, name: str) -> None:
        """Let others use the files again."""
        with lock_repo(self.repo):
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        with suppress(AssertionError, KeyError):  # DVC on another machine took our entry for a dead process's
            self._held.pop(name, ExitStack()).close()

    def record(self, names: Iterable[str]) -> dict[str, str]:
        """Write finished runs to ``dvc.lock``, all at once: it takes seconds where it is long.

        Returns name -> why for those that cannot be: an output that is no longer what the run made.
        """
        recorded, refused = [], {}
        with lock_repo(self.repo):
            for name in names:
                each = self.stages[name]
                self._let_go(name)
                try:
                    if each.kept:
                        self.repo.stage_cache.restore(each.stage)
                    each.stage.save()
                    each.stage.commit()
                    recorded.append(each.stage)
                except DvcException as error:
                    refused[name] = one_line(error, 500)
            if recorded:
                recorded[0].dvcfile.dump_stages(recorded, update_pipeline=False)
        return refused

    def sort_lock(self) -> None:
        """Put ``dvc.lock`` into the order of a serial run: what Git has, then what is new as planned."""
        lock = self.root / LOCK
        if not lock.exists():
            return
        committed = git(self.root, "show", f"HEAD:./{LOCK}")
        before = loads_yaml(committed.decode()).get("stages", {}) if committed else {}
        new = [name for name in self.stages if name not in before]
        with lock_repo(self.repo), modify_yaml(lock) as data:
            stages = dict(data["stages"])
            data["stages"].clear()
            others = [name for name in stages if name not in before and name not in new]  # of an earlier run
            for name in [name for name in [*before, *others, *new] if name in stages]:
                data["stages"][name] = stages[name]
