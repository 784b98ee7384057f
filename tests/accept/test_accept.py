"""An edit is accepted when it changes no bit, and refused, with nothing touched, when it might."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pipelines import choose, commit, duplicate, dvc, git, stages_run

pytestmark = pytest.mark.slow
ASCENT, OBJECTIVES = "dynat/methods/attacks.py", "dynat/methods/objectives.py"
TRAININGS = ("train_dynat@digits-dynat_awp-0", "train_baseline@digits-gairat-0")


@pytest.fixture(scope="module")
def recorded(finished_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, quick_path: str) -> Path:
    """The finished pipeline and two trainings more: one perturbs weights, one weighs instances, later on."""
    folder = duplicate(finished_pipeline, tmp_path_factory.mktemp("accept") / "repository")
    choose(folder, {"baselines": ["pgd_at", "gairat"], "variants": ["dynat", "dynat_awp"], "seeds": [0]})
    done = dvc(folder, "repro", *TRAININGS, PATH=quick_path)
    assert done.returncode == 0, done.stdout + done.stderr
    commit(folder, "two trainings more")
    return folder


@pytest.fixture
def repository(recorded: Path, tmp_path: Path) -> Path:
    return duplicate(recorded, tmp_path / "repository")


def accept(folder: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "dynat.accept", *stages)


def run(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "MLFLOW_"))}
    path = str(Path(sys.executable).parent) + os.pathsep + kept["PATH"]
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=folder, env={**kept, "PATH": path}, capture_output=True, text=True, timeout=600
    )


def edit(folder: Path, name: str, before: str, after: str) -> None:
    path = folder / name
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{name}: {before!r}"
    path.write_text(text.replace(before, after), encoding="utf-8")
    commit(folder, "edit")


def refused(folder: Path, *stages: str) -> str:
    """The line of a refusal, which must leave the repository as it was."""
    before = git(folder, "status", "--porcelain"), (folder / "dvc.lock").read_bytes()
    done = accept(folder, *stages)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (git(folder, "status", "--porcelain"), (folder / "dvc.lock").read_bytes()) == before
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("refused, nothing touched: ")
    return line


# ------------------------------------------------------------------------------------------------ accepted


def test_a_rewritten_loop_with_equal_bits_is_accepted_and_nothing_runs(
    repository: Path, quick_path: str
) -> None:
    edit(
        repository,
        ASCENT,
        "moved = adversarial + step * gradient.sign()",
        "signs = gradient.sign()\n            moved = step * signs + adversarial",
    )
    done = accept(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    again = dvc(repository, "repro", *TRAININGS, "tabulate", PATH=quick_path)
    assert again.returncode == 0, again.stdout + again.stderr
    ran = {name for name in stages_run(again) if name != "tabulate"}
    assert not {name for name in ran if name.startswith(("prepare", "train")) or "dynat-0" in name}
    assert not {name for name in ran if "pgd_at-0" in name}
    commit(repository, "accepted")
    audit = run(repository, "dynat.audit", "digits/dynat/0/pgd20")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "accepted" in audit.stdout
    everything = run(repository, "dynat.audit", "--all")
    assert "accepted by proof" in everything.stdout
    record = json.loads((repository / "metrics/runs/train/digits/dynat/0.json").read_text())
    assert "equal to the bit" in record["accepted"][-1]["compared"][0]


def test_without_an_edit_there_is_nothing_to_accept(repository: Path) -> None:
    done = accept(repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to accept" in done.stdout


# ------------------------------------------------------------------------------------------------ refused


LAST_BIT = "* (1 + 2**-23)"
EDITS: dict[str, tuple[str, str, str, str]] = {
    "in every step": (
        OBJECTIVES,
        "* kl).mean()",
        f"* kl).mean() {LAST_BIT}",
        "epoch 0, step 0",
    ),
    "once weights are perturbed": (
        "dynat/methods/perturbation.py",
        "(gamma * p.detach().norm()",
        f"({LAST_BIT[2:]} * gamma * p.detach().norm()",
        "epoch 1 from the stored weights, step 0",
    ),
    "once instances are weighted": (
        OBJECTIVES,
        "return raw * (",
        f"return raw {LAST_BIT} * (",
        "epoch 1 from the stored weights, step 0",
    ),
}


@pytest.mark.parametrize("when", EDITS)
def test_a_change_of_the_last_bit_is_refused_with_the_first_step_that_differs(
    repository: Path, when: str
) -> None:
    name, before, after, step = EDITS[when]
    edit(repository, name, before, after)
    assert step in refused(repository, *TRAININGS)


RESULTS = {
    "prepare@digits": ("dynat/data/sources.py", "* 255 + 8) // 16", "* 255 + 7) // 16"),
    "attack_dynat@digits-dynat-0": (
        "dynat/evaluation/verdicts.py",
        "round(100 * count / n, 4)",
        "round(100 * count / n, 4) + 1",
    ),
    "tabulate": (
        "dynat/paper/tables.py",
        "weights of the best epoch on held-out data",
        "weights of the best epoch",
    ),
}


@pytest.mark.parametrize("stage", RESULTS)
def test_another_result_of_any_other_stage_is_refused_with_what_differs(pipeline: Path, stage: str) -> None:
    edit(pipeline, *RESULTS[stage])
    line = refused(pipeline, stage)
    assert line.startswith(f"refused, nothing touched: {stage}: ")
    assert "differs from the recorded code's" in line


def test_a_changed_function_that_nothing_executed_is_refused_by_name(repository: Path) -> None:
    edit(
        repository,
        OBJECTIVES,
        "rival = probabilities.masked_fill(own, 0)",
        "rival = probabilities.masked_fill(own, 0.0)",
    )
    assert "boosted_ce" in refused(repository, *TRAININGS)


def uncommitted(folder: Path) -> None:
    path = folder / ASCENT
    path.write_text(path.read_text().replace("step * gradient.sign()", "gradient.sign() * step"))


def parameter(folder: Path) -> None:
    choose(folder, {"study.digits.train.lr": 0.04})
    edit(folder, ASCENT, "step * gradient.sign()", "gradient.sign() * step")


def data(folder: Path) -> None:
    edit(folder, ASCENT, "step * gradient.sign()", "gradient.sign() * step")
    path = folder / "data/digits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it may be a link into the cache
    path.write_bytes(content)


def output(folder: Path) -> None:
    edit(folder, ASCENT, "step * gradient.sign()", "gradient.sign() * step")
    path = folder / "models/digits/dynat_awp/0/target.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (uncommitted, "attacks.py: not as committed"),
        (parameter, "study.digits.train"),
        (data, "data/digits.safetensors is modified"),
        (output, "models/digits/dynat_awp/0 is modified"),
    ],
)
def test_what_is_not_the_edit_alone_is_refused(
    repository: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(repository)
    assert says in refused(repository, TRAININGS[0])
