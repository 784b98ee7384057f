"""The links of each cell, from its text down to the commit; a link that several cells share is made once."""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

from dynat.audit.circumstances import circumstances
from dynat.audit.history import commits
from dynat.audit.lineage import CODE, Lineage
from dynat.audit.link import Audited, Link, absent, broken, good, one_line, some
from dynat.audit.printed import Printed, Source, kind_and_run
from dynat.audit.selection import stages_behind
from dynat.data.download import verify, verify_weights
from dynat.errors import UserError
from dynat.runtime.files import read_json, sha256
from dynat.runtime.lock import locked
from dynat.runtime.machine import pin

TABLES = "all tables"  # not a cell: what concerns all of them


def audit(printed: Printed, lineage: Lineage, keys: Iterable[str], whole: bool = False) -> Audited:
    """Links 1 to 4 of each cell; ``whole`` adds an item for the tables and for stages behind no cell."""
    behind = {key: stages_behind(printed, lineage, key) for key in keys}
    stages = dict.fromkeys(stage for chain, _ in behind.values() for stage in chain)
    if whole:
        idle = [stage for stage in lineage.stages if stage not in stages and lineage.never_run(stage)]
        stages |= dict.fromkeys(stage for stage in lineage.stages if stage not in idle)
    history, record = commits(lineage, stages), cache(partial(circumstances, printed.root))
    archive = cache(partial(_archive, printed))
    found: Audited = {}
    for key, (chain, missing) in behind.items():
        links = [*printed.check(key), *missing]
        links += [link for stage in chain for link in lineage.check(stage)]
        links += [link for name in chain for link in archive(name)]
        links += [] if whole else history
        for source in [] if missing else printed.sources(key):
            links += [link for at in _runs(printed, lineage, source) for link in record(*at)]
        found[key] = list(dict.fromkeys(links))
    if whole:
        chained = [link for stage in stages for link in lineage.check(stage)]
        found[TABLES] = [*printed.tables(), *chained, *history]
        if idle:
            found[TABLES].append(absent("chain", "dvc.yaml", f"never run, and in no number: {some(idle)}"))
    return found


def _archive(printed: Printed, stage: str) -> list[Link]:
    """Whether what ``prepare@<setting>`` or ``import@<checkpoint>`` read is still what params.yaml says."""
    kind, _, which = stage.partition("@")
    if kind == "prepare" and (study := printed.params.study.get(which)) and study.data.archive:
        name, held = study.data.archive, partial(verify, study.data, f"study.{which}.data")
    elif kind == "import" and (given := printed.params.checkpoint.get(which)):
        name, held = given.file, partial(verify_weights, given, f"checkpoint.{which}")
    else:
        return []
    try:
        if held():
            return [good("data", name, "at hand, with the hash that params.yaml says")]
        return [absent("data", name, "not at hand; its hash is that of params.yaml in dvc.lock")]
    except UserError as error:
        advice = f"bring it back, or give its hash and run dvc repro {stage}"
        return [broken("data", name, str(error), advice)]


def _runs(printed: Printed, lineage: Lineage, source: Source) -> Iterator[tuple[str, str, str, str]]:
    """Stage, run, weights and code of the trainings and of the evaluation behind a source."""
    kind, run = kind_and_run(source)
    try:  # SHA-256 of the weights that the metrics are of; empty if they are unreadable or do not say
        model = str((read_json(printed.root, source["file"]) or {}).get("model_sha256", ""))
    except UserError:
        model = ""
    *guides, (made, _) = printed.behind(run)
    behind = [(made, run, model, f"models/{run}"), (kind, run, model, source["file"])]
    for stage, guide in guides:
        file = printed.root / f"models/{guide}/target.safetensors"
        behind.insert(0, (stage, guide, sha256(file) if file.is_file() else "", f"models/{guide}"))
    for stage, of, weights, output in behind:
        entry = lineage.lock.get(lineage.producers.get(output, ""), {})
        yield stage, of, weights, locked(entry, "deps").get(f"{CODE}{stage}.json", "")


def add_evidence(printed: Printed, found: Audited, deep: bool, steps: int) -> None:
    """Links 5 and 6: what the stored outputs prove, where the CPU is pinned as it was for them."""
    if not (deep or steps):
        return
    if "torch" not in sys.modules:
        study, settings = printed.params.study, [key.split("/")[0] for key in found]
        pin(study[next((each for each in settings if each in study), printed.params.settings[0])].machine)
    from dynat.audit.evidence import replay, witness

    done: dict[object, list[Link]] = {}
    for key, links in found.items():
        for source in printed.cells.get(key, {}).get("sources", ()):
            run, verdict = kind_and_run(source)[1], (source["file"], source["checkpoint"], source["attack"])
            if deep and verdict not in done:
                done[verdict] = _attempt(source["file"], partial(witness, printed, source))
            if steps and run not in done:
                done[run] = _attempt(run, partial(replay, printed, run, steps))
            links += [link for at in (verdict, run) for link in done.get(at, ()) if link not in links]


def _attempt(subject: str, check: Callable[[], list[Link]]) -> list[Link]:
    try:
        return check()
    except UserError as error:
        return [absent("evidence", subject, str(error))]
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        return [broken("evidence", subject, f"does not fit together ({one_line(error)})", "run dvc repro")]
