"""The chain of ``dvc.lock``: command, parameters and hashes of each stage against what is there now.

``dvc.yaml`` is expanded by DVC itself; hashes are of the content, never of DVC's record of sizes and times.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.dependency import ParamsDependency
from dvc.dvcfile import load_file
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import SCMError
from dvc.stage import PipelineStage
from dvc.stage.loader import StageLoader
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from dynat.audit.link import Link, absent, broken, good, some
from dynat.errors import UserError
from dynat.runtime.lock import LOCK, locked, locked_params, parse_yaml, read_lock

RERUN = "run dvc repro, or restore it with git checkout"


class Lineage:
    """The expanded stages of a repository and what ``dvc.lock`` says of them.

    Raises :class:`UserError` if ``dvc.yaml``, ``params.yaml`` or ``dvc.lock`` cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = read_lock(root)
        try:
            self.repo = Repo(str(root))
            self.dvcfile = load_file(self.repo, str(root.resolve() / "dvc.yaml"))
            names = list(self.dvcfile.resolver.get_keys())
            self.stages: dict[str, PipelineStage] = {name: self._stage(name) for name in names}
        except SCMError:
            raise UserError("no Git repository here; audit a clone, made with git clone") from None
        except DvcException as error:
            raise UserError(f"dvc.yaml: {' '.join(str(error).split())}; restore it") from None
        self.producers = {out.def_path: name for name, stage in self.stages.items() for out in stage.outs}
        self.outputs_missing: set[str] = set()  # checked stages with an output that is not here
        self._hashes: dict[str, str | None] = {}
        self._links: dict[str, list[Link]] = {}

    def _stage(self, name: str) -> PipelineStage:
        resolved = self.dvcfile.resolver.resolve_one(name)[name]
        return StageLoader.load_stage(self.dvcfile, name, resolved, self.lock.get(name, {}))

    @cached_property
    def locked_outs(self) -> dict[str, str]:
        """Path -> hash of every output that ``dvc.lock`` knows, of stages no longer selected too."""
        stale = {o["path"]: o.get("md5", "") for entry in self.lock.values() for o in entry.get("outs", [])}
        return stale | {
            path: locked(self.lock.get(name, {}), "outs").get(path, "")
            for path, name in self.producers.items()
        }

    def chain(self, stage: str) -> list[str]:
        """``stage`` and all that it depends on, the first to run first."""
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            for dep in self.stages[name].deps:
                if dep.def_path in self.producers:
                    visit(self.producers[dep.def_path])
            found[name] = None

        visit(stage)
        return list(found)

    def behind(self, path: str) -> set[str]:
        """The stage that writes a file or its folder, or else the stages that read just it, such as code."""
        writers = {name for out, name in self.producers.items() if path == out or path.startswith(f"{out}/")}
        return writers or {
            name
            for name, stage in self.stages.items()
            if any(d.def_path == path for d in stage.deps if not isinstance(d, ParamsDependency))
        }

    def left_something(self, name: str) -> bool:
        """Whether a stage has an entry in ``dvc.lock`` or an output here."""
        return name in self.lock or any((self.root / out.def_path).exists() for out in self.stages[name].outs)

    def never_run(self, besides: Collection[str]) -> list[Link]:
        """A link that tells of the stages not in ``besides``, if there are any."""
        names = [name for name in self.stages if name not in besides]
        return [absent("chain", "dvc.yaml", f"never run, and in no number: {some(names)}")] if names else []

    def check(self, name: str) -> list[Link]:
        """One good link for a stage whose lock entry fits, or a broken one for each thing that does not."""
        if name not in self._links:
            self._links[name] = self._check(name)
        return self._links[name]

    def _check(self, name: str) -> list[Link]:
        entry = self.lock.get(name)
        if not entry:
            return [broken("chain", name, f"has no entry in {LOCK}: it was never run", "run dvc repro")]
        stage = self.stages[name]
        deps, params = list(self._dependencies(stage, entry)), locked_params(entry)
        links = [*self._command(stage, entry), *deps, *self._outs(stage, entry)]
        if faults := [link for link in links if link.state == "broken"]:
            return faults
        missing = [link.text for link in links]
        hashes = len(locked(entry, "deps")) - len(deps)  # without the deps that cannot be checked here
        here = f"; not here: {some(missing)} (run dvc repro, or dvc pull from your remote)" if missing else ""
        self.outputs_missing |= {name} if missing else set()
        made = some(f"{path.rsplit('/', 1)[-1]} {md5[:8]}" for path, md5 in locked(entry, "outs").items())
        text = f"command, {len(params)} parameters and {hashes} hashes hold → {made}{here}"
        return [good("chain", name, text)]

    def _command(self, stage: PipelineStage, entry: Mapping[str, Any]) -> Iterator[Link]:
        name = stage.addressing
        if entry.get("cmd") != stage.cmd:
            yield broken("chain", name, f"ran {entry.get('cmd')!r}, dvc.yaml says {stage.cmd!r}", RERUN)
        ran, now = locked_params(entry), dict[str, Any]()
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                now |= {key: _at(self.params, key) for key in dep.params}
        changed = [key for key in sorted(ran.keys() | now.keys()) if ran.get(key) != now.get(key)]
        gaps = [difference(key, ran.get(key), now.get(key)) for key in changed]
        if gaps:
            each = some(f"{key} = {_short(was)} (params.yaml: {_short(is_now)})" for key, was, is_now in gaps)
            yield broken("chain", name, f"ran with {each}", RERUN)

    @cached_property
    def params(self) -> Any:
        """The content of ``params.yaml``."""
        return parse_yaml((self.root / "params.yaml").read_text(encoding="utf-8"))

    def _dependencies(self, stage: PipelineStage, entry: Mapping[str, Any]) -> Iterator[Link]:
        name, ran = stage.addressing, locked(entry, "deps")
        wanted = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        for path in sorted({*ran} ^ {*wanted}):
            which = "dvc.lock" if path in wanted else "dvc.yaml"
            yield broken("chain", name, f"the dependency {path} is not in {which}", RERUN)
        changed = []
        for path in wanted:
            if path not in ran:
                continue
            below = [out for out in self.locked_outs if out.startswith(f"{path}/")]
            if path in self.producers:
                if ran[path] != self.locked_outs[path]:
                    producer = self.producers[path]
                    yield broken("chain", name, f"used another {path} than {producer} wrote", "run dvc repro")
            elif below:
                known = self._gathered(path, ran[path])
                if known is None:
                    yield absent("chain", name, f"the files in {path}/")
                elif not known:
                    text = f"used another content of {path} than its stages wrote (rerun since?)"
                    yield broken("chain", name, text, "run dvc repro")
            elif self.hash(path) != ran[path]:
                changed.append(f"{path} {'is missing' if self.hash(path) is None else 'has changed'}")
        if changed:
            yield broken("chain", name, f"{some(changed)} since it ran", RERUN)

    def _gathered(self, folder: str, wanted: str) -> bool | None:
        """Whether the outputs below ``folder`` make up the directory hash ``wanted``, None if unknown here.

        Files beside them, and outputs of stages no longer selected, count where they are at hand.
        """
        outs = {path: md5 for path, md5 in self.locked_outs.items() if path.startswith(f"{folder}/")}
        current = {path: md5 for path, md5 in outs.items() if path in self.producers}
        here = {path: path for path in self.files(folder)}
        for known in (current, outs):
            listing = {}
            for path, md5 in known.items():
                if not md5.endswith(".dir"):
                    listing[path] = md5
                    continue
                inside = self.listing(path, md5)
                if inside is None:  # a folder whose listing only the cache has
                    return None
                listing |= {f"{path}/{name}": each for name, each in inside.items()}
            for path in here:
                if path not in listing and not any(path.startswith(f"{out}/") for out in known):
                    listing[path] = self.hash(path) or ""
            if tree_hash({path.removeprefix(f"{folder}/"): md5 for path, md5 in listing.items()}) == wanted:
                return True
        return False

    def listing(self, path: str, md5: str) -> dict[str, str] | None:
        """Relative file name -> hash of a directory output, from the cache or the workspace, else None."""
        try:
            tree = Tree.load(self.repo.cache.local, HashInfo("md5", md5))
            return {"/".join(key): info.value for key, _, info in tree}
        except Exception:  # not in the cache, or damaged there: the workspace may have it
            if self.hash(path) != md5:
                return None
            return {name.removeprefix(f"{path}/"): self.hash(name) or "" for name in self.files(path)}

    def _outs(self, stage: PipelineStage, entry: Mapping[str, Any]) -> Iterator[Link]:
        ran = locked(entry, "outs")
        paths = [out.def_path for out in stage.outs]
        for path in sorted({*ran} ^ {*paths}):
            which = "dvc.lock" if path in paths else "dvc.yaml"
            yield broken("chain", stage.addressing, f"the output {path} is not in {which}", RERUN)
        for out in stage.outs:
            now = self.hash(out.def_path)
            if out.def_path not in ran or now == ran[out.def_path]:
                continue
            if now is None and out.use_cache:
                yield absent("chain", stage.addressing, out.def_path)
            else:
                what = "is missing" if now is None else "is not what the stage wrote"
                how = "git checkout" if not out.use_cache else "dvc checkout"
                text = f"{out.def_path} {what} ({(now or 'none')[:8]}, {LOCK} has {ran[out.def_path][:8]})"
                yield broken("chain", stage.addressing, text, f"restore it with {how}, or run dvc repro")

    def files(self, folder: str) -> list[str]:
        """The files below a folder, relative to the repository, without those that DVC ignores."""
        found = self.repo.dvcignore.find(self.repo.fs, str(self.root.resolve() / folder))
        return sorted(os.path.relpath(path, self.root.resolve()).replace(os.sep, "/") for path in found)

    def hash(self, path: str) -> str | None:
        """DVC's hash of a file or folder as it is now; None if there is none."""
        if path not in self._hashes:
            self._hashes[path] = self._hash(path)
        return self._hashes[path]

    def _hash(self, path: str) -> str | None:
        full = self.root / path
        if full.is_dir():
            names = self.files(path)
            return tree_hash({name.removeprefix(f"{path}/"): self.hash(name) or "" for name in names})
        try:
            with open(full, "rb") as file:
                return hashlib.file_digest(file, "md5").hexdigest()
        except OSError:
            return None


def tree_hash(listing: Mapping[str, str]) -> str:
    """DVC's hash of a folder: relative file name -> md5."""
    tree = Tree()
    for name, md5 in listing.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
    return hashlib.md5(tree.as_bytes(), usedforsecurity=False).hexdigest() + ".dir"


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """Where two parameter values first differ: the key down to there, and both."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*was, *now]):
            if was.get(name) != now.get(name):
                return difference(f"{key}.{name}", was.get(name), now.get(name))
    return key, was, now


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
