"""The chain of ``dvc.lock``: command, parameters and hashes of each stage against what is there now.

``dvc.yaml`` is expanded by DVC itself; hashes are of the content, never of DVC's record of sizes and times.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
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
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from dynat.audit.link import Link, absent, broken, good, one_line, some
from dynat.errors import UserError
from dynat.runtime.files import read_json
from dynat.runtime.lock import LOCK, locked, locked_params, parse_yaml, read_lock

CODE = "metrics/code/"  # the closure of each stage's code, written by stage check
RERUN = "run dvc repro, or restore it with git checkout"
LISTINGS = HashFileDB(MemoryFileSystem(), "/listings")


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

    def left_something(self, name: str) -> bool:
        """Whether a stage has an entry in ``dvc.lock`` or an output here."""
        return name in self.lock or any((self.root / out.def_path).exists() for out in self.stages[name].outs)

    def never_run(self, besides: Collection[str]) -> list[Link]:
        """A link that tells of the stages not in ``besides``, if there are any."""
        names = [name for name in self.stages if name not in besides]
        return [absent("chain", "dvc.yaml", f"never run, and in no number: {some(names)}")] if names else []

    # -------------------------------------------------------------------------------------------- the checks

    def check(self, name: str) -> list[Link]:
        """One good link for a stage whose lock entry fits, or a broken one for each thing that does not."""
        if name not in self._links:
            self._links[name] = self._check(self.stages[name], self.lock.get(name))
        return self._links[name]

    def _check(self, stage: PipelineStage, entry: Mapping[str, Any] | None) -> list[Link]:
        name = stage.addressing
        if not entry:
            return [broken("chain", name, f"has no entry in {LOCK}: it was never run", "run dvc repro")]
        unknown = list(self._dependencies(stage, locked(entry, "deps")))
        links = [*self._command(stage, entry), *unknown, *self._outputs(stage, locked(entry, "outs"))]
        if faults := [link for link in links if link.state == "broken"]:
            return faults
        missing = [link.text for link in links]
        params, hashes = len(locked_params(entry)), len(locked(entry, "deps")) - len(unknown)
        here = f"; not here: {some(missing)} (run dvc repro, or dvc pull from your remote)" if missing else ""
        self.outputs_missing |= {name} if missing else set()
        made = some(f"{path.rsplit('/', 1)[-1]} {md5[:8]}" for path, md5 in locked(entry, "outs").items())
        return [good("chain", name, f"command, {params} parameters and {hashes} hashes hold → {made}{here}")]

    def _command(self, stage: PipelineStage, entry: Mapping[str, Any]) -> Iterator[Link]:
        if entry.get("cmd") != stage.cmd:
            text = f"ran {entry.get('cmd')!r}, dvc.yaml says {stage.cmd!r}"
            yield broken("chain", stage.addressing, text, RERUN)
        ran = flatten(locked_params(entry))
        keys = [key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params]
        now = {
            leaf: value
            for leaf, value in self.params.items()
            if any(leaf == key or leaf.startswith(f"{key}.") for key in keys)
        }
        if changed := [leaf for leaf in dict.fromkeys([*ran, *now]) if ran.get(leaf) != now.get(leaf)]:
            each = some(
                f"{leaf} = {_short(ran.get(leaf))} (params.yaml: {_short(now.get(leaf))})" for leaf in changed
            )
            yield broken("chain", stage.addressing, f"ran with {each}", RERUN)

    def _dependencies(self, stage: PipelineStage, ran: Mapping[str, str]) -> Iterator[Link]:
        name, wanted = stage.addressing, self.inputs[stage.addressing]
        yield from _unlisted(name, "dependency", ran, wanted)
        for path in (each for each in wanted if each in ran):
            now: set[str | None]
            if path in self.producers:
                now, text = (
                    {self.locked_outs.get(path)},
                    f"used another {path} than {self.producers[path]} wrote",
                )
            elif any(out.startswith(f"{path}/") for out in self.locked_outs):
                now = {*self._gathered(f"{path}/")}
                text = f"used another content of {path} than its stages wrote (rerun since?)"
            else:
                now = {self.hash(path)}
                text = f"{path} {'is missing' if None in now else 'has changed'} since it ran"
            if not now:  # a folder whose listing only the cache has
                yield absent("chain", name, f"the files in {path}/")
            elif ran[path] not in now:
                yield broken("chain", name, text, RERUN)

    def _gathered(self, folder: str) -> Iterator[str | None]:
        """The hashes that a folder has by the outputs in it, none if a listing is not at hand.

        Files beside them, and outputs of stages no longer selected, count where they are at hand.
        """
        outs = {path: md5 for path, md5 in self.locked_outs.items() if path.startswith(folder)}
        here = self.repo.dvcignore.find(self.repo.fs, str(self.root.resolve() / folder))
        files = [os.path.relpath(path, self.root.resolve()).replace(os.sep, "/") for path in here]
        for known in ({path: md5 for path, md5 in outs.items() if path in self.producers}, outs):
            parts = {path: self._listing(path, md5) for path, md5 in known.items()}
            for path in files:
                if path not in known and not any(path.startswith(f"{out}/") for out in known):
                    parts[path] = {(): self.hash(path) or ""}
            tree = Tree()
            for path, part in parts.items():
                if part is None:
                    return
                for key, md5 in part.items():
                    tree.add((*path.removeprefix(folder).split("/"), *key), None, HashInfo("md5", md5))
            tree.digest()
            yield tree.hash_info.value

    def _listing(self, path: str, md5: str) -> dict[tuple[str, ...], str] | None:
        """Hash by relative name of the files of an output, from the cache or the workspace, else None."""
        if not md5.endswith(".dir"):
            return {(): md5}
        try:
            tree = Tree.load(self.repo.cache.local, HashInfo("md5", md5))
        except Exception:  # not in the cache, or damaged there: the workspace may have it
            tree = self._content(path)
            if hash_of(tree) != md5:
                return None
        return {key: info.value for key, _, info in tree}

    def _outputs(self, stage: PipelineStage, ran: Mapping[str, str]) -> Iterator[Link]:
        name = stage.addressing
        yield from _unlisted(name, "output", ran, [out.def_path for out in stage.outs])
        for out in stage.outs:
            now = self.hash(out.def_path)
            if out.def_path not in ran or now == ran[out.def_path]:
                continue
            if now is None and out.use_cache:
                yield absent("chain", name, out.def_path)
                continue
            what = "is not what the stage wrote" if now else "is missing"
            text = f"{out.def_path} {what} ({(now or 'none')[:8]}, {LOCK} has {ran[out.def_path][:8]})"
            how = "dvc checkout" if out.use_cache else "git checkout"
            yield broken("chain", name, text, f"restore it with {how}, or run dvc repro")

    # ------------------------------------------------------------------------------------------------ hashes

    def hash(self, path: str) -> str | None:
        """DVC's hash of a file or folder as it is now; None if there is none."""
        if path not in self._hashes:
            self._hashes[path] = hash_of(self._content(path))
        return self._hashes[path]

    def _content(self, path: str) -> Any:
        return content(self.repo.fs, str(self.root.resolve() / path), self.repo.dvcignore)


def content(files: Any, path: str, ignore: Any = None) -> Any:
    """DVC's object of a file or folder in one of its file systems, None if there is none to read."""
    try:
        return build(LISTINGS, path, files, "md5", dry_run=True, ignore=ignore)[2]
    except OSError:
        return None


def hash_of(found: Any) -> str | None:
    """DVC's hash of a :func:`content`."""
    return found.hash_info.value if found else None


def listed(closure: Mapping[str, Any], file: str) -> dict[str, str]:
    """Hash of each module and data file of a closure, by its name after that of the closure's ``file``."""
    every = {**closure.get("modules", {}), **closure.get("data", {})}
    return {f"{file} {name}": str(md5) for name, md5 in every.items()}


def _unlisted(name: str, what: str, ran: Iterable[str], wanted: Collection[str]) -> Iterator[Link]:
    for path in sorted({*ran} ^ {*wanted}):
        where = LOCK if path in wanted else "dvc.yaml"
        yield broken("chain", name, f"the {what} {path} is not in {where}", RERUN)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
