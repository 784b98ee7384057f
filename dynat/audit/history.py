"""The commit in which an entry of ``dvc.lock`` appeared, and whether its code was committed as it ran."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dvc.fs import GitFileSystem

from dynat.audit.lineage import CODE, Lineage, hash_of, listed
from dynat.audit.link import Link, absent, broken, good, some
from dynat.runtime.lock import LOCK, locked

ENTRY = re.compile(r"^  (\S.*?):\n((?:    .*\n|\n)*)", re.MULTILINE)
CLOSURE = Path(__file__).parents[1] / "runtime/closure.py"


def commits(lineage: Lineage, stages: Iterable[str]) -> list[Link]:
    """A link per commit that brought an entry of ``stages``: whether the code that ran was committed."""
    root = lineage.root
    if reason := _refusal(root):
        advice = "mend that, or audit a clone of your own"
        return [broken("commit", LOCK, f"Git does not answer ({reason})", advice)]
    lock = (root / LOCK).read_text(encoding="utf-8") if lineage.lock else ""
    entries = dict(ENTRY.findall(lock))
    wanted = {name: entries[name] for name in stages if name in entries}
    waiting, found = {*wanted}, dict[str, str]()
    log = (git(root, "log", "--first-parent", "--format=%H", "--", LOCK) or b"").decode().split()
    for commit in log:  # the newest first: an entry appeared in the last that has it
        then = _entries(root, commit)
        waiting = {name for name in waiting if then.get(name) == wanted[name]}
        found |= dict.fromkeys(waiting, commit)
        if not waiting:
            break
    cut = waiting if git(root, "rev-parse", "--is-shallow-repository") == b"true\n" else set()
    brought: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        if name in found and name not in cut:
            brought[found[name]].append(name)
    links = [_clean(lineage, commit, names) for commit, names in brought.items()]
    if cut:
        text = f"this clone's history is cut before the entries of {some(sorted(cut))} appeared"
        links.append(absent("commit", LOCK, text, "run git fetch --unshallow"))
    apart = {name: wanted[name] for name in wanted if name not in {*found, *cut}}
    return [*links, *_uncommitted(lineage, apart)]


def _uncommitted(lineage: Lineage, wanted: dict[str, str]) -> Iterator[Link]:
    """The experiments whose ``dvc.lock`` has these entries, and those that are nowhere."""
    from dvc.repo.experiments.utils import exp_refs  # takes its time, and is seldom needed

    scm, nowhere = lineage.repo.scm, dict(wanted)
    for ref in exp_refs(scm) if wanted else ():
        commit = scm.get_ref(str(ref))
        for stage, entry in _entries(lineage.root, commit).items():
            if nowhere.get(stage) == entry:
                del nowhere[stage]
                yield good("commit", stage, f"from the experiment {ref.name} ({commit[:10]})")
    if nowhere:
        text = f"in no commit are the entries of {some(sorted(nowhere))}"
        yield absent("commit", LOCK, text, "commit dvc.lock and metrics together")


def _entries(root: Path, commit: str) -> dict[str, str]:
    """Stage -> its lines in the ``dvc.lock`` of a commit."""
    return dict(ENTRY.findall((git(root, "show", f"{commit}:./{LOCK}") or b"").decode()))


# ------------------------------------------------------------------------------------- the code at a commit


def _clean(lineage: Lineage, commit: str, names: list[str]) -> Link:
    """Whether each file of code, and each module that a closure lists, was committed with the stages."""
    files, prefix = GitFileSystem(scm=lineage.repo.scm, rev=commit), _prefix(lineage)
    made = {*lineage.producers, *lineage.locked_outs}
    ran: dict[str, str] = {
        path: md5
        for name in names
        for path, md5 in locked(lineage.lock[name], "deps").items()
        if path.startswith(CODE) or not any(f"{out}/".startswith(f"{path}/") for out in made)
    }
    then = {path: hash_of(files, f"{prefix}/{path}") for path in ran}
    now = {path: lineage.hash(path) for path in ran}
    for path in [path for path in ran if path.startswith(CODE) and ran[path] == then[path]]:
        try:
            ran |= listed(json.loads(files.open(f"{prefix}/{path}", "rb").read()), path)
        except (AttributeError, TypeError, ValueError):  # not as check writes it
            ran |= {path: "unreadable"}
        then |= listed(_closures(lineage.root, commit).get(Path(path).stem, {}), path)
        now |= lineage.closure(path)
    when = (git(lineage.root, "log", "-1", "--format=%cs", commit) or b"").decode().strip()
    subject = f"commit {commit[:10]} ({when})"
    if wrong := [name for name in {**ran, **then} if ran.get(name) != then.get(name)]:
        text = f"{some(wrong)} differ from what {some(names, 2)} ran with: the tree was not clean"
        return broken("commit", subject, text, "commit code and dvc.lock together, after dvc repro")
    count = len({name.rpartition(" ")[2] for name in ran})
    text = f"brought {some(names, 2)}; tree clean, its {count} code files are those recorded"
    return good("commit", subject, text, [f"{name}: {ran[name]} then, {now.get(name)} now" for name in ran])


def _prefix(lineage: Lineage) -> str:
    """Where the project lies in its Git repository, which may be a larger one."""
    within = lineage.root.resolve().relative_to(Path(lineage.repo.scm.root_dir).resolve()).as_posix()
    return "" if within == "." else f"/{within}"


@cache
def _closures(root: Path, commit: str) -> dict[str, Any]:
    """Stage -> closure of the code at a commit, computed anew; none if there is no such code."""
    with TemporaryDirectory() as folder:
        if not checkout(root, commit, Path(folder)):
            return {}
        command = [sys.executable, "-P", str(CLOSURE), folder]
        done = subprocess.run(command, cwd=folder, capture_output=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def checkout(root: Path, commit: str, folder: Path) -> bool:
    """Write the code at a commit below ``folder``; False if there is none."""
    archive = git(root, "archive", commit, "dynat", "stages")
    if archive is not None:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
    return archive is not None


def commit_with(root: Path, file: str, md5: str) -> str | None:
    """The newest commit that changed ``file`` to the content of that MD5."""
    for commit in (git(root, "log", "--format=%H", "--", file) or b"").decode().split():
        content = git(root, "show", f"{commit}:./{file}") or b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return commit
    return None


def _refusal(root: Path) -> str | None:
    """Why Git does not answer here, such as a folder that belongs to somebody else; None if it does."""
    try:
        done = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=root, capture_output=True, text=True)
    except OSError as error:
        return f"git: {error.strerror}"
    return None if done.returncode == 0 else (done.stderr.splitlines() or ["no reason given"])[0]


def git(root: Path, *arguments: str) -> bytes | None:
    """What a command of Git prints in ``root``; None where it fails, or there is no Git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError:  # no git
        return None
    return done.stdout if done.returncode == 0 else None
