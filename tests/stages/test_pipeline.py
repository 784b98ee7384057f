"""The pipeline as a user runs it: real ``dvc`` in a copy of the repository, on a smaller selection.

The finished pipeline was run by processes of their own, whatever is run here by forks of one process.
"""

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import FINISHED, choose, commit, copy, dvc, dvc_environment, git, stages_run
from safetensors.torch import load_file

from dynat.evaluation.verdicts import accuracy, encode
from dynat.networks.weights import load_network

pytestmark = pytest.mark.slow


def test_two_runs_give_the_same_lock_and_metrics_to_the_byte(
    finished_pipeline: Path, tmp_path: Path, quick_path: str
) -> None:
    again = copy(tmp_path / "again")
    choose(again, FINISHED)
    result = dvc(again, "repro", PATH=quick_path)
    assert result.returncode == 0, result.stdout + result.stderr
    produced = [
        path.relative_to(finished_pipeline)
        for path in sorted((finished_pipeline / "metrics").rglob("*"))
        if path.is_file() and "runs" not in path.parts
    ]
    assert len(produced) > 8
    for name in [Path("dvc.lock"), *produced]:
        assert (again / name).read_bytes() == (finished_pipeline / name).read_bytes(), name


def test_a_second_repro_runs_nothing(pipeline: Path) -> None:
    result = dvc(pipeline, "repro")
    assert result.returncode == 0
    assert stages_run(result) == set()


def test_table_holds_a_number_for_every_selected_method(finished_pipeline: Path) -> None:
    table = (finished_pipeline / "metrics/tables/digits.csv").read_text()
    assert "pgd_at" in table
    assert "dynat" in table
    cells = json.loads((finished_pipeline / "metrics/tables/cells.json").read_text())
    assert {"digits/pgd_at/0/aa", "digits/dynat/0/aa", "digits/dynat/0/pgd20"} <= set(cells)


def test_the_last_epoch_is_attacked_on_as_many_training_images_as_test_images(
    finished_pipeline: Path,
) -> None:
    name = "digits/dynat/0"
    metrics, verdicts = (
        json.loads((finished_pipeline / f"metrics/attack/{name}.{ending}").read_text())
        for ending in ("json", "verdicts.json")
    )
    witness = load_file(finished_pipeline / f"metrics/attack/{name}.witness.safetensors")
    data = load_file(finished_pipeline / "data/digits.safetensors")
    n = metrics["last"]["clean"]["n"]
    x, y = data["train_images"][:n].float() / 255, data["train_labels"][:n]
    network, _ = load_network(
        finished_pipeline / f"models/{name}/target.last.safetensors", torch.device("cpu")
    )
    with torch.no_grad():
        clean = network(x).argmax(1) == y
        broken, images = (witness[f"last-train/pgd20/{each}"] for each in ("indices", "images"))
        fooled = network(images).argmax(1) != y[broken]
    assert metrics["last-train"].keys() == verdicts["last-train"].keys() == {"clean", "pgd20"}
    assert metrics["last-train"]["clean"] == accuracy(clean.tolist())
    assert fooled.all()
    assert (images - x[broken]).abs().max() <= metrics["epsilon"] + 1e-6
    robust = clean.clone()
    robust[broken] = False
    assert 0 < len(broken) < clean.sum()
    assert metrics["last-train"]["pgd20"] == accuracy(robust.tolist())
    assert verdicts["last-train"]["pgd20"] == {"n": n, "robust": encode(robust.tolist())}


def test_a_distilled_method_learns_from_a_guide_of_its_own_stage_and_the_audit_names_both_trainings(
    pipeline: Path, quick_path: str
) -> None:
    chosen = ("distilled=[rslad]", "guides=[pgd_at]", "seeds=[0]")
    options = [part for each in chosen for part in ("-S", each)]
    result = dvc(pipeline, "exp", "run", *options, PATH=quick_path)
    assert result.returncode == 0, result.stdout + result.stderr
    kinds = ("train", "attack", "autoattack")
    assert stages_run(result) == {
        "check",
        "train_guide@digits-pgd_at-0",
        *(f"{kind}_distilled@digits-rslad-pgd_at-0" for kind in kinds),
        "tabulate",
    }
    commit(pipeline, "distilled")
    for column in ("pgd20", "last-train-pgd20"):
        command = [sys.executable, "-m", "dynat.audit", "--deep", f"digits/rslad-pgd_at/0/{column}"]
        audited = subprocess.run(command, cwd=pipeline, env=dvc_environment(), capture_output=True, text=True)
        assert audited.returncode == 0, audited.stdout + audited.stderr
        for run in ("guide-pgd_at", "rslad-pgd_at"):
            assert f"metrics/runs/train/digits/{run}/0.json" in audited.stdout
        assert "witness" in audited.stdout


def test_alpha_reruns_the_dynat_family_and_the_tables_and_nothing_else(
    pipeline: Path, quick_path: str
) -> None:
    result = dvc(pipeline, "exp", "run", "-S", "alpha=0.5", PATH=quick_path)
    assert result.returncode == 0, result.stdout + result.stderr
    family = [
        f"{kind}_dynat@digits-dynat-{seed}" for kind in ("train", "attack", "autoattack") for seed in (0, 1)
    ]
    assert stages_run(result) == {"check", *family, "tabulate"}  # check reads params.yaml, changes nothing


def test_mlflow_holds_a_finished_run_of_every_stage_with_the_models_hash(finished_pipeline: Path) -> None:
    query = """
        SELECT runs.name, stage.value, length(model.value), runs.status FROM runs
        JOIN experiments ON experiments.experiment_id = runs.experiment_id AND experiments.name = 'digits'
        JOIN tags AS stage ON stage.run_uuid = runs.run_uuid AND stage.key = 'stage'
        JOIN tags AS model ON model.run_uuid = runs.run_uuid AND model.key = 'model.sha256'
        """
    assert sorted(rows(finished_pipeline, query)) == [
        (f"{method}-{seed}", stage, 64, "FINISHED")
        for method in ("dynat", "pgd_at")
        for seed in (0, 1)
        for stage in ("attack", "autoattack", "train")
    ]


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What the repository's MLflow store holds, straight from its tables."""
    with closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
        return store.execute(query).fetchall()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("alpha=abc", "alpha"),
        ("alpha=-1", "alpha"),
        ("variants=[dynatt]", "variants"),
        ("launch=pyton", "launch"),
        ("study.digits.train.epsilon=1.5", "study.digits.train.epsilon"),
        ("study.digits.autoattack.n=[5000]", "study.digits.autoattack.n"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key_and_nothing_is_overwritten(
    pipeline: Path, quick_path: str, override: str, key: str
) -> None:
    before = outputs(pipeline)
    result = dvc(pipeline, "exp", "run", "-S", override, PATH=quick_path)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    faults = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(faults) == 1
    assert key in faults[0]
    assert outputs(pipeline) == before


def outputs(folder: Path) -> dict[str, bytes]:
    """Content of all that stages write, but for the mark that params.yaml is sound."""
    files = [path for name in ("data", "models", "metrics") for path in (folder / name).rglob("*")]
    return {
        str(path): path.read_bytes() for path in files if path.is_file() and path.name != "params.checked"
    }


def test_a_sweep_in_the_queue_with_two_workers_lands_in_one_store(pipeline: Path, quick_path: str) -> None:
    command = ["exp", "run", "--queue", "-S", "seeds=[0]", "-S", "alpha=0.25,0.75"]
    queued = dvc(pipeline, *command)
    assert queued.returncode == 0, queued.stdout + queued.stderr
    assert dvc(pipeline, "queue", "start", "-j", "2", PATH=quick_path).returncode == 0
    names = wait_for(pipeline, 2)
    query = """
        SELECT name.value, stage.value, alpha.value, runs.status FROM runs
        JOIN tags AS name ON name.run_uuid = runs.run_uuid AND name.key = 'dvc.exp_name'
        JOIN tags AS stage ON stage.run_uuid = runs.run_uuid AND stage.key = 'stage'
        LEFT JOIN params AS alpha ON alpha.run_uuid = runs.run_uuid AND alpha.key = 'alpha'
        WHERE runs.name = 'dynat-0'
        """
    found = [row for row in rows(pipeline, query) if row[0] in names]
    assert {(name, stage, status) for name, stage, _, status in found} == {
        (name, stage, "FINISHED") for name in names for stage in ("train", "attack", "autoattack")
    }
    assert sorted(alpha for _, stage, alpha, _ in found if stage == "train") == ["0.25", "0.75"]


def wait_for(repository: Path, count: int) -> list[str]:
    """The names of the queue's experiments when that many have succeeded."""
    asked, deadline = time.monotonic(), time.monotonic() + 900
    while time.monotonic() < deadline:
        done = git(repository, "for-each-ref", "refs/exps/??/*/*").splitlines()
        if len(done) == count or time.monotonic() > asked + 30:  # DVC needs seconds to answer
            status = dvc(repository, "queue", "status").stdout
            assert "Failed" not in status, dvc(repository, "queue", "logs", failed(status)).stdout
            succeeded = [line.split()[1] for line in status.splitlines() if line.endswith("Success")]
            if len({*succeeded}) == count:
                return succeeded
            asked = time.monotonic()
        time.sleep(0.5)
    raise AssertionError("the queue is not done")


def failed(status: str) -> str:
    return next(line.split()[1] for line in status.splitlines() if line.endswith("Failed"))
