"""Stages that are killed at any moment and started again end with the bytes of those that were not.

Each family of methods is trained once in peace and once under SIGKILL, at random moments, during the writing
of its state and during that of its outputs; so are both evaluations. Every test demands at least two kills
that struck. The stages are the real ones, in processes of their own.
"""

import random
import re
import shutil
import signal
import time
from typing import Any

import pytest
from stages_under_fire import FAMILIES, Workspace, after, hashes, resumed_after, states, write_params

pytestmark = pytest.mark.slow


def killed(stages: Workspace, stage: str, *arguments: str, **how: Any) -> bool:
    """Run a stage under a kill; whether it struck. Nothing but the kill may end it otherwise."""
    code = stages.run(stage, *arguments, **how)
    assert code in (0, -signal.SIGKILL), stages.said()
    return code != 0


def epochs_done(log: str) -> int:
    return max((int(found) for found in re.findall(r"^epoch (\d+)  ", log, re.MULTILINE)), default=-1)


@pytest.mark.parametrize("method", FAMILIES)
def test_a_killed_training_ends_with_the_same_bytes_and_loses_no_step_that_was_saved(
    stages: Workspace, method: str
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
    kills: list[dict[str, Any]] = [
        {"strike": after(chance.uniform(0, 0.5 * duration))},
        {"kill_at": (r"\.pt\.tmp$", chance.randrange(2))},
        {"kill_at": (r"/\.0\.partial(/.*)?$", chance.randrange(4))},
        {},
    ]
    known, struck = -1, list[dict[str, Any]]()
    for kill in kills:
        if killed(stages, "train", *cell, **kill):
            struck.append(kill)
            known = max(known, epochs_done(stages.said()))
        else:
            assert resumed_after(stages.said()) >= known, "a step that was saved has been lost"
            assert hashes(outputs) == expected
        if not states(folder):  # done but for the exit of the process
            known = -1
    assert [kill for kill in kills if "kill_at" in kill] == [kill for kill in struck if "kill_at" in kill]
    assert hashes(outputs) == expected
    assert states(folder) == []


def evaluated(stages: Workspace, stage: str) -> dict[str, str]:
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
def test_a_killed_evaluation_ends_with_the_same_bytes_and_repeats_no_finished_chunk(
    trained: Workspace, stage: str, workers: int, count: int
) -> None:
    cell, chance = ("mini", "pgd_at", "0"), random.Random(workers)
    write_params(trained.folder, autoattack__workers=1)
    begun = time.monotonic()
    assert trained.run(stage, *cell) == 0, trained.said()
    duration = time.monotonic() - begun
    assert len(chunks := trained.chunks()) == count
    expected = evaluated(trained, stage)

    write_params(trained.folder, autoattack__workers=workers)
    kills: list[dict[str, Any]] = [
        {"kill_at": (r"\.pt\.tmp$", chance.randrange(2))},  # first, while there are chunks to save
        {"strike": after(chance.uniform(0.1, 0.4 * duration))},
        {"kill_at": (rf"metrics/{stage}/mini/pgd_at/\.0\..*\.tmp$", chance.randrange(3))},
        {},
    ]
    done: list[str] = []
    struck = list[dict[str, Any]]()
    for kill in kills:
        last = not killed(trained, stage, *cell, **kill)
        done += trained.chunks()
        if not last:
            struck.append(kill)
            continue
        assert len({*done}) == len(done), "a chunk that was finished has been done again"
        assert {*done} <= {*chunks}
        assert evaluated(trained, stage) == expected
        assert states(trained.folder) == []
        done.clear()
    assert [kill for kill in kills if "kill_at" in kill] == [kill for kill in struck if "kill_at" in kill]
