"""The commit in which an entry of ``dvc.lock`` appeared, and whether its code was committed as it ran."""

import hashlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dynat.audit.lineage import Lineage, tree_hash
from dynat.audit.link import Link, absent, broken, good, some
from dynat.runtime.lock import LOCK, locked

AT_ONCE = 32  # revisions of dvc.lock in memory
EXPERIMENT = re.compile(r"^(\w+) (refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/.+)$", re.MULTILINE)
ENTRY = re.compile(r"^  (\S.*?):\n((?:    .*\n|\n)*)", re.MULTILINE)


def commits(lineage: Lineage, stages: Iterable[str]) -> list[Link]:
    """A link per commit that brought an entry of ``stages``, or per way in which its code differs from it."""
    root = lineage.root
    entries = _entries((root / LOCK).read_text(encoding="utf-8")) if (root / LOCK).exists() else {}
    wanted = {name: entries[name] for name in stages if name in entries and name in lineage.lock}
    if not wanted:
        return []
    if _git(root, "rev-parse", "--verify", "HEAD") is None:
        return [absent("commit", LOCK, "there is no commit yet", "commit dvc.lock and metrics together")]
    found, oldest = _appeared(root, wanted)
    cut = (_git(root, "rev-parse", "--is-shallow-repository") or b"").strip() == b"true"
    by_commit: dict[str, list[str]] = defaultdict(list)
    for name, commit in found.items():
        if not (cut and name in oldest):
            by_commit[commit].append(name)
    links = [link for commit, names in by_commit.items() for link in _clean(lineage, commit, names)]
    if cut and oldest:
        text = f"this clone's history is cut before the entries of {some(sorted(oldest))} appeared"
        links.append(absent("commit", LOCK, text, "run git fetch --unshallow"))
    apart = {name: entry for name, entry in wanted.items() if name not in found}
    experiments = _experiments(root, apart) if apart else {}
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
    open_names = set(wanted)
    for commit, then in _locks(root, listed):  # the newest first
        for name in sorted(open_names):
            if then.get(name) == wanted[name]:
                found[name] = commit
            else:
                open_names.discard(name)
        if not open_names:
            break
    return found, open_names & found.keys()


def _clean(lineage: Lineage, commit: str, names: list[str]) -> list[Link]:
    """Whether each file of code that the stages ran with was committed with them."""
    hashes: dict[str, str] = {}
    for name in names:
        outputs = (*lineage.producers, *lineage.locked_outs)
        hashes |= {
            path: md5
            for path, md5 in locked(lineage.lock[name], "deps").items()
            if path not in outputs and not any(out.startswith(f"{path}/") for out in outputs)
        }
    then = _at_commit(lineage.root, commit, list(hashes))
    wrong = [path for path, md5 in hashes.items() if then.get(path) != md5]
    when = (_git(lineage.root, "log", "-1", "--format=%cs", commit) or b"").decode().strip()
    subject = f"commit {commit[:10]} ({when})"
    if wrong:
        text = f"{some(wrong)} differ from what {some(names, 2)} ran with: the tree was not clean"
        return [broken("commit", subject, text, "commit code and dvc.lock together, after dvc repro")]
    text = f"brought {some(names, 2)}; tree clean, its {len(hashes)} code files are those that ran"
    details = [f"{path}: {md5} then, {lineage.hash(path)} now" for path, md5 in hashes.items()]
    return [good("commit", subject, text, details)]


def _at_commit(root: Path, commit: str, paths: list[str]) -> dict[str, str]:
    """Path -> DVC's hash of files and folders as they were at a commit."""
    listed = (_git(root, "ls-tree", "-r", "-z", commit, "--", *paths) or b"").decode().split("\0")
    blobs = {line.split("\t", 1)[1]: line.split()[2] for line in listed if line}
    contents = _blobs(root, list(blobs.values()))
    md5 = {
        path: hashlib.md5(contents[blob], usedforsecurity=False).hexdigest() for path, blob in blobs.items()
    }
    found = {}
    for path in paths:
        below = {
            name.removeprefix(f"{path}/"): each for name, each in md5.items() if name.startswith(f"{path}/")
        }
        if path in md5 or below:
            found[path] = md5[path] if path in md5 else tree_hash(below)
    return found


def _blobs(root: Path, names: list[str]) -> dict[str, bytes]:
    """Git object, as a hash or commit:path -> its content; without those that do not exist."""
    output = _git(root, "cat-file", "--batch", stdin="".join(f"{n}\n" for n in names).encode()) or b""
    found, place = {}, 0
    for name in names:
        start = output.find(b"\n", place) + 1
        head = output[place:start].split()
        place = start
        if head[-1:] != [b"missing"]:
            size = int(head[-1])
            found[name] = output[start : start + size]
            place += size + 1
    return found


def _locks(root: Path, revisions: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each commit and the entries of its ``dvc.lock``; several at once, as each Git call takes time."""
    for start in range(0, len(revisions), AT_ONCE):
        batch = revisions[start : start + AT_ONCE]
        contents = _blobs(root, [f"{commit}:{LOCK}" for commit in batch])
        for commit in batch:
            yield commit, _entries(contents.get(f"{commit}:{LOCK}", b"").decode())


def _experiments(root: Path, wanted: dict[str, str]) -> dict[str, str]:
    """Stage -> name and commit of the experiment whose ``dvc.lock`` holds its entry."""
    refs = (_git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or b"").decode()
    names = {commit: name.rsplit("/", 1)[1] for commit, name in EXPERIMENT.findall(refs)}
    found: dict[str, str] = {}
    for commit, then in _locks(root, list(names)):
        for stage, entry in wanted.items():
            if then.get(stage) == entry:
                found.setdefault(stage, f"{names[commit]} ({commit[:10]})")
    return found


def _entries(text: str) -> dict[str, str]:
    """Stage -> its lines in a ``dvc.lock``."""
    return dict(ENTRY.findall(text))


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, input=stdin, capture_output=True)
    except OSError:  # no git
        return None
    return done.stdout if done.returncode == 0 else None
