"""What was changed since the run is named, in the audit of a cell as in that of all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tampering
from tampering import ATTACK, CELL

from dynat.audit.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),  # of a package that DVC uses
]
Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], None]

CHANGES: list[tuple[Change, str]] = [
    (tampering.cut_metric, f"{ATTACK}.json: cannot be read"),
    (tampering.table, "metrics/tables/digits.md: is not what the verdicts give"),
    (tampering.cells, "its text is '99.99 [99.9, 100.0]', the verdicts give"),
    (tampering.metric, "/best/pgd20/accuracy says"),
    (tampering.verdicts, f"{ATTACK}.verdicts.json is not what the stage wrote"),
    (tampering.weights, "models/digits/pgd_at/0 is not what the stage wrote"),
    (tampering.data, "data/digits.safetensors is not what the stage wrote"),
    (tampering.lock, "used another data/digits.safetensors than prepare@digits wrote"),
    (tampering.code, "check: dynat has changed"),
    (tampering.parameter, "study.digits.train.lr = 0.05 (params.yaml: 0.06)"),
    (tampering.command, "dvc.yaml says 'python -m stages.attack digits pgd_at 0'"),
    (tampering.other_seed, f"{ATTACK}.json is not what the stage wrote"),
    (tampering.other_seed, "metrics/runs/train/digits/pgd_at/0.json: is of the weights"),
    (tampering.stage_never_run, "has no entry in dvc.lock: it was never run"),
    (tampering.closure_of_other_code, "used another metrics/code/train.json than check wrote"),
    (tampering.code_after_commit, "metrics/code/train.json dynat.methods.step differ from what"),
    (tampering.code_after_commit, "the tree was not clean"),
    (tampering.module_left_out, "metrics/code/train.json dynat.methods.step differ from what"),
    (tampering.lock_without_dependency, "the dependency metrics/code/train.json is not in dvc.lock"),
    (tampering.lock_without_output, f"the output {ATTACK}.verdicts.json is not in dvc.lock"),
    (tampering.metric_removed, f"{ATTACK}.json is missing"),
    (tampering.record_of_other_seed, "0.json: is the record of train_baseline@digits-pgd_at-1"),
    (tampering.failed_mlflow_run, "is FAILED"),
    (tampering.mlflow_run_of_other_weights, "is FINISHED, of the weights 0000000000"),
]


@pytest.mark.parametrize("change", dict.fromkeys(change for change, _ in CHANGES))
def test_what_was_changed_is_named(repository: Path, capsys: Capture, change: Change) -> None:
    change(repository)
    cell = "digits/pgd_at/mean/pgd20" if change is tampering.table else CELL
    assert main([cell]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    for said in (text for each, text in CHANGES if each is change):
        assert any(said in line for line in faults), faults


def test_all_names_every_change(repository: Path, capsys: Capture) -> None:
    """Changes that do not hide one another."""
    apart = (
        tampering.table,
        tampering.data,
        tampering.weights,
        tampering.parameter,
        tampering.failed_mlflow_run,
        tampering.record_of_other_seed,
        tampering.lock_without_output,
    )
    for change in apart:
        change(repository)
    assert main(["--all"]) == 1
    output = capsys.readouterr().out
    for said in (text for change, text in CHANGES if change in apart):
        assert said in output


def test_a_number_changed_in_what_dvc_compares_is_named_with_all(repository: Path, capsys: Capture) -> None:
    path = repository / "metrics/tables/summary/digits/pgd_at.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aa": 99.0}, indent=1) + "\n")
    assert main(["--all"]) == 1
    assert (
        "metrics/tables/summary/digits/pgd_at.json: is not what the verdicts give" in capsys.readouterr().out
    )


def test_a_row_whose_stage_was_never_run_is_no_number(repository: Path, capsys: Capture) -> None:
    path = repository / "metrics/tables/cells.json"
    found = json.loads(path.read_text())
    invented = json.loads(json.dumps(found[CELL]).replace("pgd_at/0", "trades/0"))
    path.write_text(json.dumps({**found, "digits/trades/0/pgd20": invented}))
    assert main(["digits/trades/0/pgd20"]) == 1
    assert "no stage of dvc.yaml writes it" in capsys.readouterr().out


def test_a_stage_rerun_but_not_tabulated_is_named(repository: Path, capsys: Capture) -> None:
    """An attack that gave something else: its outputs and its entry in dvc.lock fit together."""
    outs: dict[str, Any] = {}
    for suffix in (".json", ".verdicts.json", ".witness.safetensors"):
        other = f"metrics/attack/digits/pgd_at/1{suffix}"
        shutil.copy(repository / other, repository / f"{ATTACK}{suffix}")
        outs[f"{ATTACK}{suffix}"] = tampering.entry(
            repository, "attack_baseline@digits-pgd_at-1", "outs", other
        )["md5"]

    def rerun(entry: dict[str, Any]) -> None:
        for out in entry["outs"]:
            out["md5"] = outs.get(out["path"], out["md5"])

    tampering.locked(repository, "attack_baseline@digits-pgd_at-0", rerun)
    assert main([CELL]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert any("the verdicts give" in line and "run dvc repro tabulate" in line for line in faults), faults
