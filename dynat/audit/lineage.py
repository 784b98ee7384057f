"""The chain of ``dvc.lock``: command, parameters and hashes of each stage against what is there now.

``dvc.yaml`` is expanded by DVC itself; hashes are of the content, never of DVC's record of sizes and times.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.dvcfile import load_file
from dvc.exceptions import DvcException
from dvc.fs import MemoryFileSystem
from dvc.repo import Repo
from dvc.scm import SCMError
from dvc.stage import PipelineStage
from dvc.stage.loader import StageLoader
from dvc.utils.flatten import flatten
from dvc_data.hashfile.build import build
from dvc_data.hashfile.db import HashFileDB

from dynat.audit.link import Link, broken, good, one_line, some
from dynat.errors import UserError
from dynat.runtime.files import read_json
from dynat.runtime.lock import LOCK, locked, locked_params, parse_yaml, read_lock

CODE = "metrics/code/"  # the closure of each stage's code, written by stage check
RERUN = "run dvc repro, or restore it with git checkout or dvc checkout"
LISTINGS = HashFileDB(MemoryFileSystem(), "/listings")
Facts = dict[str, dict[str, Any]]  # command, parameter, dependency, output -> value or hash by name


class Lineage:
    """The expanded stages of a repository and what ``dvc.lock`` says of them.

    Raises :class:`UserError` if ``dvc.yaml``, ``params.yaml`` or ``dvc.lock`` cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = read_lock(root)
        try:
            self.repo = Repo(str(root))
            file = load_file(self.repo, str(root.resolve() / "dvc.yaml"))
            self.stages: dict[str, PipelineStage] = {
                name: StageLoader.load_stage(
                    file, name, file.resolver.resolve_one(name)[name], self.lock.get(name, {})
                )
                for name in file.resolver.get_keys()
            }
        except SCMError:
            raise UserError("no Git repository here; audit a clone, made with git clone") from None
        except DvcException as error:
            raise UserError(f"dvc.yaml: {one_line(error)}; restore it") from None
        self.inputs = {  # stage -> the files and folders that it reads
            name: [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
            for name, stage in self.stages.items()
        }
        self.producers = {out.def_path: name for name, stage in self.stages.items() for out in stage.outs}
        self.locked_outs = {  # path -> hash, of stages no longer selected too, unless another writes it now
            path: md5
            for name in sorted(self.lock, key=self.stages.__contains__)
            for path, md5 in locked(self.lock[name], "outs").items()
        }
        self.outputs_missing: set[str] = set()  # checked stages with an output that is not here
        self._hashes: dict[str, str | None] = {}
        self._links: dict[str, list[Link]] = {}

    @cached_property
    def params(self) -> dict[str, Any]:
        """Every leaf of ``params.yaml`` by its dotted key."""
        return dict(flatten(parse_yaml((self.root / "params.yaml").read_text(encoding="utf-8"))))

    def chain(self, stage: str) -> list[str]:
        """``stage`` and all that it depends on, the first to run first."""
        before = [self.producers[path] for path in self.inputs[stage] if path in self.producers]
        return list(dict.fromkeys([*(name for each in before for name in self.chain(each)), stage]))

    def behind(self, path: str) -> set[str]:
        """The stage that writes a file or its folder, or else the stages that read it or run its code."""
        writers = {name for out, name in self.producers.items() if path == out or path.startswith(f"{out}/")}
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        read = {path}
        for file in self.producers:
            if file.startswith(CODE) and {f"{file} {path}", f"{file} {module}"} & {*self.closure(file)}:
                read.add(file)
        return writers or {name for name, paths in self.inputs.items() if read & {*paths}}

    def closure(self, file: str) -> dict[str, str]:
        """What a file of ``metrics/code`` lists now, nothing if it is not here or broken."""
        try:
            return listed(read_json(self.root, file) or {}, file)
        except UserError:
            return {}

    def never_run(self, name: str) -> bool:
        """Whether a stage has neither an entry in ``dvc.lock`` nor an output here."""
        outs = self.stages[name].outs
        return name not in self.lock and all(self.hash(out.def_path) is None for out in outs)

    def check(self, name: str) -> list[Link]:
        """One good link for a stage whose lock entry fits, or a broken one for each thing that does not."""
        if name not in self._links:
            self._links[name] = self._compare(self.stages[name], self.lock.get(name))
        return self._links[name]

    def _compare(self, stage: PipelineStage, entry: Mapping[str, Any] | None) -> list[Link]:
        """What ``dvc.lock`` recorded of a stage against DVC's expansion of it and the files."""
        name = stage.addressing
        if not entry:
            return [broken("chain", name, f"has no entry in {LOCK}: it was never run", "run dvc repro")]
        ran: Facts = {
            "command": {name: entry.get("cmd")},
            "parameter": flatten(locked_params(entry)),
            "dependency": locked(entry, "deps"),
            "output": locked(entry, "outs"),
        }
        now = self._now(stage, ran)
        texts = [
            self._difference(what, path, ran[what].get(path), now[what].get(path))
            for what in ran
            for path in {**ran[what], **now[what]}
            if ran[what].get(path) != now[what].get(path)
        ]
        if texts:
            return [broken("chain", name, text, RERUN) for text in texts]
        missing = [path for path in ran["output"] if self.hash(path) is None]
        self.outputs_missing |= {name} if missing else set()
        here = f"; not here: {some(missing)} (run dvc repro, or dvc pull from your remote)" if missing else ""
        made = some(f"{path.rsplit('/', 1)[-1]} {md5[:8]}" for path, md5 in ran["output"].items())
        counts = f"{len(ran['parameter'])} parameters and {len(ran['dependency'])} dependencies"
        return [good("chain", name, f"command, {counts} hold → {made}{here}")]

    def _now(self, stage: PipelineStage, ran: Facts) -> Facts:
        """What ``dvc.lock`` should have of a stage; an empty hash for what is missing.

        Of a cached output that is not here, and of the folders that gather outputs of others (the tables are
        counted again from these), what it has is believed.
        """
        keys = [key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params]
        inputs = {}
        for path in self.inputs[stage.addressing]:
            if path in self.producers:
                inputs[path] = self.locked_outs.get(path, "")
            elif any(out.startswith(f"{path}/") for out in self.locked_outs):
                inputs[path] = ran["dependency"].get(path, "")
            else:
                inputs[path] = self.hash(path) or ""
        outputs = {}
        for out in stage.outs:
            believed = ran["output"].get(out.def_path, "") if out.use_cache else ""
            outputs[out.def_path] = self.hash(out.def_path) or believed
        params = {
            leaf: value
            for leaf, value in self.params.items()
            if any(f"{leaf}.".startswith(f"{key}.") for key in keys)
        }
        command = {stage.addressing: stage.cmd}
        return {"command": command, "parameter": params, "dependency": inputs, "output": outputs}

    def _difference(self, what: str, path: str, then: Any, now: Any) -> str:
        if what == "command":
            return f"ran {then!r}, dvc.yaml says {now!r}"
        if what == "parameter":
            return f"ran with {path} = {then!s:.60} (params.yaml: {now!s:.60})"
        if then is None or now is None:
            return f"the {what} {path} is not in {LOCK if then is None else 'dvc.yaml'}"
        if what == "dependency" and path in self.producers:
            return f"used another {path} than {self.producers[path]} wrote"
        if not now:
            return f"{path} is missing"
        return f"{path} {'is not what the stage wrote' if what == 'output' else 'has changed since it ran'}"

    def hash(self, path: str) -> str | None:
        """DVC's hash of a file or folder as it is now; None if there is none."""
        if path not in self._hashes:
            self._hashes[path] = hash_of(self.repo.fs, str(self.root.resolve() / path), self.repo.dvcignore)
        return self._hashes[path]


def hash_of(files: Any, path: str, ignore: Any = None) -> str | None:
    """DVC's hash of a file or folder in one of its file systems, None if there is none to read."""
    try:
        found = build(LISTINGS, path, files, "md5", dry_run=True, ignore=ignore)[2]
    except OSError:
        return None
    return found.hash_info.value if found else None


def listed(closure: Mapping[str, Any], file: str) -> dict[str, str]:
    """Hash of each module and data file of a closure, by its name after that of the closure's ``file``."""
    every = {**closure.get("modules", {}), **closure.get("data", {})}
    return {f"{file} {name}": str(md5) for name, md5 in every.items()}
