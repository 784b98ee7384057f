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

from dynat.audit.lineage import CODE, Lineage, content, hash_of, listed
from dynat.audit.link import Link, absent, broken, good, some
from dynat.runtime.lock import LOCK, locked

ENTRY = re.compile(r"^  (\S.*?):\n((?:    .*\n|\n)*)", re.MULTILINE)
CLOSURE = Path(__file__).parents[1] / "runtime/closure.py"


def commits(lineage: Lineage, stages: Iterable[str]) -> list[Link]:
    """A link per commit that brought an entry of ``stages``: whether the code that ran was committed."""
    root = lineage.root
    entries = _entries((root / LOCK).read_bytes()) if (root / LOCK).exists() else {}
    wanted = {name: entries[name] for name in stages if name in entries and name in lineage.lock}
    if not wanted:
        return []
    if _git(root, "rev-parse", "--verify", "HEAD") is None:
        return [absent("commit", LOCK, "there is no commit yet", "commit dvc.lock and metrics together")]
    found, oldest = _appeared(root, wanted)
    cut = oldest if _git(root, "rev-parse", "--is-shallow-repository") == b"true\n" else set()
    by_commit: dict[str, list[str]] = defaultdict(list)
    for name, commit in found.items():
        if name not in cut:
            by_commit[commit].append(name)
    links = [_clean(lineage, commit, names) for commit, names in by_commit.items()]
    if cut:
        text = f"this clone's history is cut before the entries of {some(sorted(cut))} appeared"
        links.append(absent("commit", LOCK, text, "run git fetch --unshallow"))
    apart = {name: entry for name, entry in wanted.items() if name not in found}
    experiments = _experiments(lineage, apart) if apart else {}
    links += [good("commit", name, f"from the experiment {each}") for name, each in experiments.items()]
    if nowhere := sorted(apart.keys() - experiments.keys()):
        text = f"in no commit are the entries of {some(nowhere)}"
        links.append(absent("commit", LOCK, text, "commit dvc.lock and metrics together"))
    return links


def _appeared(root: Path, wanted: dict[str, str]) -> tuple[dict[str, str], set[str]]:
    """Stage -> the commit from which on its entry stood in ``dvc.lock`` as it does now.

    And the stages whose commit is the oldest that is known.
    """
    listed = (_git(root, "log", "--first-parent", "--format=%H", "--", LOCK) or b"").decode().split()
    found: dict[str, str] = {}
    waiting = set(wanted)
    for commit, then in _locks(root, listed):  # the newest first
        waiting = {name for name in sorted(waiting) if then.get(name) == wanted[name]}
        if not waiting:
            break
        found |= dict.fromkeys(sorted(waiting), commit)
    return found, waiting


def _experiments(lineage: Lineage, wanted: dict[str, str]) -> dict[str, str]:
    """Stage -> name and commit of the experiment whose ``dvc.lock`` holds its entry."""
    from dvc.repo.experiments.utils import exp_refs  # takes its time, and is seldom needed

    scm = lineage.repo.scm
    names = {scm.get_ref(str(ref)): ref.name for ref in exp_refs(scm)}
    return {
        stage: f"{names[commit]} ({commit[:10]})"
        for commit, then in _locks(lineage.root, names)
        for stage, entry in wanted.items()
        if then.get(stage) == entry
    }


def _locks(root: Path, commits: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each commit and the entries of its ``dvc.lock``, from one Git process."""
    command = ["git", "cat-file", "--batch"]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as git:
        assert git.stdin
        assert git.stdout
        for commit in commits:
            git.stdin.write(f"{commit}:{LOCK}\n".encode())
            git.stdin.flush()
            *_, size = git.stdout.readline().split()
            lock = b"" if size == b"missing" else git.stdout.read(int(size) + 1)[:-1]
            yield commit, _entries(lock)


def _entries(lock: bytes) -> dict[str, str]:
    """Stage -> its lines in a ``dvc.lock``."""
    return dict(ENTRY.findall(lock.decode()))


# ------------------------------------------------------------------------------------- the code at a commit


def _clean(lineage: Lineage, commit: str, names: list[str]) -> Link:
    """Whether each file of code, and each module that a closure lists, was committed with the stages."""
    files = GitFileSystem(scm=lineage.repo.scm, rev=commit)
    made = {*lineage.producers, *lineage.locked_outs}
    ran: dict[str, str] = {
        path: md5
        for name in names
        for path, md5 in locked(lineage.lock[name], "deps").items()
        if path.startswith(CODE) or not any(out == path or out.startswith(f"{path}/") for out in made)
    }
    then = {path: hash_of(content(files, f"/{path}")) for path in ran}
    now = {path: lineage.hash(path) for path in ran}
    closures = [path for path in ran if path.startswith(CODE) and ran[path] == then[path]]
    again = _closures(lineage.root, commit) if closures else {}
    for path in closures:
        try:
            ran |= listed(json.loads(files.open(f"/{path}", "rb").read()), path)
        except (AttributeError, TypeError, ValueError):  # not as check writes it
            ran |= {path: "unreadable"}
        then |= listed(again.get(Path(path).stem, {}), path)
        now |= lineage.closure(path)
    when = (_git(lineage.root, "log", "-1", "--format=%cs", commit) or b"").decode().strip()
    subject = f"commit {commit[:10]} ({when})"
    if wrong := [name for name in dict.fromkeys([*ran, *then]) if ran.get(name) != then.get(name)]:
        text = f"{some(wrong)} differ from what {some(names, 2)} ran with: the tree was not clean"
        return broken("commit", subject, text, "commit code and dvc.lock together, after dvc repro")
    count = len({name.rpartition(" ")[2] for name in ran})
    text = f"brought {some(names, 2)}; tree clean, its {count} code files are those recorded"
    return good("commit", subject, text, [f"{name}: {ran[name]} then, {now.get(name)} now" for name in ran])


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
    archive = _git(root, "archive", commit, "dynat", "stages")
    if archive is not None:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
            tree.extractall(folder, filter="data")
    return archive is not None


def commit_with(root: Path, file: str, md5: str) -> str | None:
    """The newest commit that changed ``file`` to the content of that MD5."""
    for commit in (_git(root, "log", "--format=%H", "--", file) or b"").decode().split():
        content = _git(root, "show", f"{commit}:./{file}") or b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            return commit
    return None


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError:  # no git
        return None
    return done.stdout if done.returncode == 0 else None
