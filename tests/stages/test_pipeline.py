"""The pipeline as a user runs it: real ``dvc`` in a copy of the repository, on a smaller selection."""

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from pipelines import FINISHED, choose, copy, duplicate, dvc, stages_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(finished_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return duplicate(finished_pipeline, tmp_path_factory.mktemp("pipeline") / "repository")


def test_two_runs_give_the_same_lock_and_metrics_to_the_byte(repository: Path, tmp_path: Path) -> None:
    again = copy(tmp_path / "again")
    choose(again, FINISHED)
    result = dvc(again, "repro")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (again / "dvc.lock").read_bytes() == (repository / "dvc.lock").read_bytes()
    produced = [
        path.relative_to(repository)
        for path in sorted((repository / "metrics").rglob("*"))
        if path.is_file() and "runs" not in path.parts
    ]
    assert len(produced) > 8
    for name in produced:
        assert (again / name).read_bytes() == (repository / name).read_bytes(), name


def test_a_second_repro_runs_nothing(repository: Path) -> None:
    result = dvc(repository, "repro")
    assert result.returncode == 0
    assert stages_run(result) == set()


def test_table_holds_a_number_for_every_selected_method(repository: Path) -> None:
    table = (repository / "metrics/tables/digits.csv").read_text()
    assert "pgd_at" in table
    assert "dynat" in table
    cells = json.loads((repository / "metrics/tables/cells.json").read_text())
    assert {"digits/pgd_at/0/aa", "digits/dynat/0/aa", "digits/dynat/0/pgd20"} <= set(cells)


def test_alpha_reruns_the_dynat_family_and_the_tables_and_nothing_else(repository: Path) -> None:
    result = dvc(repository, "exp", "run", "-S", "alpha=0.5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert stages_run(result) == {
        "check",  # reads params.yaml, changes nothing
        *(
            f"{kind}_dynat@digits-dynat-{seed}"
            for kind in ("train", "attack", "autoattack")
            for seed in (0, 1)
        ),
        "tabulate",
    }


def test_mlflow_holds_a_finished_run_of_every_stage_with_the_models_hash(repository: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{repository / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    finished = {(run.info.run_name, run.data.tags["stage"]) for run in runs if run.info.status == "FINISHED"}
    for method in ("pgd_at-0", "dynat-0"):
        for stage in ("train", "attack", "autoattack"):
            assert (method, stage) in finished
    assert all(len(run.data.tags["model.sha256"]) == 64 for run in runs)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("alpha=abc", "alpha"),
        ("alpha=-1", "alpha"),
        ("variants=[dynatt]", "variants"),
        ("launch=pyton", "launch"),
        ("study.digits.train.epsilon=1.5", "study.digits.train.epsilon"),
        ("study.digits.train.batch=5000", "study.digits.train.batch"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key_and_nothing_is_overwritten(
    repository: Path, tmp_path: Path, override: str, key: str
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder, symlinks=True)
    before = outputs(folder)
    result = dvc(folder, "exp", "run", "-S", override)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    faults = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(faults) == 1
    assert key in faults[0]
    assert outputs(folder) == before


def outputs(folder: Path) -> dict[str, bytes]:
    """Content of all that stages write, but for the mark that params.yaml is sound."""
    files = [path for name in ("data", "models", "metrics") for path in (folder / name).rglob("*")]
    return {
        str(path): path.read_bytes() for path in files if path.is_file() and path.name != "params.checked"
    }


def test_a_sweep_in_the_queue_with_two_workers_lands_in_one_store(repository: Path) -> None:
    queued = dvc(repository, "exp", "run", "--queue", "-S", "alpha=0.25,0.75")
    assert queued.returncode == 0, queued.stdout + queued.stderr
    assert dvc(repository, "queue", "start", "-j", "2").returncode == 0
    deadline = time.monotonic() + 900
    while (status := dvc(repository, "queue", "status").stdout).count("Success") < 2:
        assert "Failed" not in status, dvc(repository, "queue", "logs", failed(status)).stdout
        assert time.monotonic() < deadline, status
        time.sleep(2)
    names = [line.split()[1] for line in status.splitlines() if line.endswith("Success")]
    assert len(set(names)) == 2
    query = """
        SELECT name.value, stage.value, alpha.value, runs.status FROM runs
        JOIN tags AS name ON name.run_uuid = runs.run_uuid AND name.key = 'dvc.exp_name'
        JOIN tags AS stage ON stage.run_uuid = runs.run_uuid AND stage.key = 'stage'
        LEFT JOIN params AS alpha ON alpha.run_uuid = runs.run_uuid AND alpha.key = 'alpha'
        WHERE runs.name = 'dynat-0'
        """
    while True:  # what the last stage said may still be on its way
        with closing(sqlite3.connect(f"file:{repository / 'mlflow.db'}?mode=ro", uri=True)) as store:
            found = [row for row in store.execute(query) if row[0] in names]
        if len(found) == 6 and all(row[3] == "FINISHED" for row in found):
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    assert {(name, stage) for name, stage, _, _ in found} == {
        (name, stage) for name in names for stage in ("train", "attack", "autoattack")
    }
    assert sorted(alpha for _, stage, alpha, _ in found if stage == "train") == ["0.25", "0.75"]


def failed(status: str) -> str:
    return next(line.split()[1] for line in status.splitlines() if line.endswith("Failed"))
