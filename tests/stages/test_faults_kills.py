"""Stages that are killed at any moment and started again end with the bytes of those that were not.

Each family of methods is trained once in peace and once under SIGKILL, at random moments, during the writing
of its state and during that of its outputs; so are both evaluations. The stages are the real ones, in
processes of their own.
"""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from stages_under_fire import (
    FAMILIES,
    Server,
    Tally,
    after,
    hashes,
    states,
    while_there_is,
    write_params,
)

pytestmark = pytest.mark.slow
Strike = Callable[[int], None]


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    total = sum(tally.kills.values())
    print(f"\n{total} kills over {len(tally.families)} families and both evaluations: {tally.kills}")
    if tally.lost and tally.run:
        print(f"work lost per kill: mean {sum(tally.lost) / total:.2f} s, most {max(tally.lost):.2f} s")
        print(f"an uninterrupted training takes {sum(tally.run) / len(tally.run):.2f} s in the mean")


def struck(stages: Server, tally: Tally, what: str, strike: Strike, stage: str, *arguments: str) -> bool:
    """Run a stage under ``strike``; whether it was killed. Nothing but the kill may end it otherwise."""
    begun = time.time()
    code = stages.run(stage, *arguments, strike=strike)
    ended = time.time()
    assert code in (0, -signal.SIGKILL), stages.said()
    if code == 0:
        return False
    saved = [file.stat().st_mtime for file in states(stages.folder)]
    tally.add(what, ended - max([begun, *saved]))
    return True


def epochs_done(log: str) -> int:
    return max((int(found) for found in re.findall(r"^epoch (\d+)  ", log, re.MULTILINE)), default=-1)


@pytest.mark.parametrize("method", FAMILIES)
def test_a_killed_training_ends_with_the_same_bytes_and_loses_one_epoch_at_most(
    stages: Server, tally: Tally, method: str
) -> None:
    folder, cell = stages.folder, ("mini", method, "0")
    outputs = folder.joinpath("models", *cell)
    begun = time.monotonic()
    assert stages.run("train", *cell) == 0, stages.said()
    duration = time.monotonic() - begun
    expected = hashes(outputs)
    assert {"0/target.safetensors", "0/history.csv", "0/trace.csv"} <= set(expected)
    assert states(folder) == []
    shutil.rmtree(outputs)

    chance = random.Random(method)
    saving = while_there_is(folder, ".dvc/tmp/dynat/*/.state-*.tmp", chance.randrange(2))
    strikes: list[tuple[str, Strike]] = [
        ("saving", saving),
        ("anywhere", after(chance.uniform(0, 0.5 * duration))),
        ("anywhere", after(chance.uniform(0, 0.5 * duration))),
        ("writing outputs", while_there_is(outputs.parent, ".0.partial/*")),
    ]
    known, kills = -1, 0
    for what, strike in [*strikes, ("", lambda pid: None)]:
        killed = struck(stages, tally, what, strike, "train", *cell)
        resumed = re.search(r"^resumed after epoch (\d+)$", stages.said(), re.MULTILINE)
        if not killed:
            assert (int(resumed[1]) if resumed else -1) >= known, "an epoch that was saved has been lost"
            break
        kills += 1
        known = max(known, epochs_done(stages.said()))
        if not states(folder) and outputs.exists():  # done but for the exit of the process
            assert hashes(outputs) == expected
            known = -1
    assert kills >= 2
    assert hashes(outputs) == expected
    assert states(folder) == []
    tally.families.add(method)
    tally.run.append(duration)


@pytest.fixture
def trained(stages: Server) -> Server:
    assert stages.run("train", "mini", "pgd_at", "0") == 0, stages.said()
    return stages


def evaluated(stages: Server, stage: str) -> dict[str, str]:
    """Hashes of metrics, verdicts and witness, which are removed."""
    metrics = stages.folder / "metrics"
    folders = [metrics / name for name in ((stage, "sanity") if stage == "attack" else (stage,))]
    found = hashes(*folders)
    expected = {f"{stage}/mini/pgd_at/0{end}" for end in (".json", ".verdicts.json", ".witness.safetensors")}
    assert set(found) - {"sanity/mini/pgd_at/0.json"} == expected
    assert len(found) == len(expected) + (stage == "attack")
    for folder in folders:
        shutil.rmtree(folder)
    return found


@pytest.mark.parametrize(
    ("stage", "workers", "count"),
    [
        ("attack", 1, 7),  # two checkpoints, three batches, and the sanity checks
        ("autoattack", 1, 8),  # four attacks on two chunks
        ("autoattack", 2, 8),
    ],
)
def test_a_killed_evaluation_ends_with_the_same_bytes_and_repeats_no_finished_piece(
    trained: Server, tally: Tally, stage: str, workers: int, count: int
) -> None:
    cell, chance = ("mini", "pgd_at", "0"), random.Random(workers)
    write_params(trained.folder, autoattack__workers=1)
    begun = time.monotonic()
    assert trained.run(stage, *cell) == 0, trained.said()
    duration = time.monotonic() - begun
    assert len(pieces := said_pieces(trained)) == count
    expected = evaluated(trained, stage)

    write_params(trained.folder, autoattack__workers=workers)
    strikes = [after(chance.uniform(0.1, 0.4 * duration)) for _ in range(4)]
    strikes.insert(1, while_there_is(trained.folder, ".dvc/tmp/dynat/*/.piece-*.tmp"))
    strikes.append(while_there_is(trained.folder, f"metrics/{stage}/mini/pgd_at/.0.*.tmp"))
    what = f"{stage}, workers={workers}"
    done: list[str] = []
    kills = 0
    while struck(
        trained, tally, what, strikes[kills] if kills < len(strikes) else lambda pid: None, stage, *cell
    ):
        kills += 1
        done += said_pieces(trained)
    done += said_pieces(trained)
    assert kills >= 2
    assert evaluated(trained, stage) == expected
    assert len(set(done)) == len(done), "a piece that was finished has been done again"
    assert set(done) <= set(pieces)
    assert states(trained.folder) == []


def said_pieces(stages: Server) -> list[str]:
    return re.findall(r"attack: (.*)$", stages.said(), re.MULTILINE)


def test_at_least_twenty_kills_have_struck(tally: Tally) -> None:
    if len(tally.families) < len(FAMILIES):
        pytest.skip("counts the kills of all the tests above")
    assert sum(tally.kills.values()) >= 20
