"""Results that contradict their verdicts or each other are refused in one line."""

import json
from pathlib import Path

import pytest
from synthetic import COUNTS, binary, files, hexadecimal, params, put, write

from dynat.errors import UserError
from dynat.paper.tabulation import tabulate


def test_checks_of_other_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    put(tmp_path / "metrics/sanity/toy/pgd_at/0.json", {"checks": {}, "model_sha256": "other"})
    with pytest.raises(UserError, match=r"metrics/sanity/toy/pgd_at/0\.json: of other weights"):
        files(params(["pgd_at"], []), tmp_path)


def test_autoattack_of_other_weights_is_refused_with_both_files(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, aa={40: 27}, autoattack={"model_sha256": "other"})
    with pytest.raises(UserError, match="other weights") as fault:
        tabulate(params(["pgd_at"], []), tmp_path)
    message = str(fault.value)
    assert "metrics/autoattack/toy/pgd_at/0.json" in message
    assert "metrics/attack/toy/pgd_at/0.json" in message
    assert "dvc repro" in message
    assert "\n" not in message


def test_a_metric_that_its_verdicts_do_not_count_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    path = tmp_path / "metrics/attack/toy/pgd_at/0.json"
    metrics = json.loads(path.read_text())
    metrics["best"]["pgd20"]["accuracy"] += 1
    put(path, metrics)
    with pytest.raises(
        UserError, match=r"metrics/attack/toy/pgd_at/0.json: best/pgd20 says 75.0 .* count 74.0 "
    ):
        tabulate(params(["pgd_at"], []), tmp_path)


def test_one_changed_verdict_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    path = tmp_path / "metrics/attack/toy/pgd_at/0.verdicts.json"
    verdicts = json.loads(path.read_text())
    flags = binary(verdicts["best"]["cw"]["robust"], 100)
    verdicts["best"]["cw"]["robust"] = hexadecimal([False, *flags[1:]])
    put(path, verdicts)
    with pytest.raises(UserError, match="best/cw says"):
        tabulate(params(["pgd_at"], []), tmp_path)


def test_metrics_without_verdicts_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    (tmp_path / "metrics/attack/toy/pgd_at/0.verdicts.json").unlink()
    with pytest.raises(UserError, match=r"0.verdicts.json: missing"):
        tabulate(params(["pgd_at"], []), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"epsilon": 1}', '{"model_sha256": "a", "best": 3}'])
def test_metrics_that_no_stage_wrote_are_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics/attack/toy/pgd_at/0.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match="toy/pgd_at/0") as fault:
        tabulate(params(["pgd_at"], []), tmp_path)
    assert "\n" not in str(fault.value)


def test_a_lock_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS)
    (tmp_path / "dvc.lock").write_text("stages: {a: [")
    with pytest.raises(UserError, match=r"dvc.lock: cannot be read .*git checkout") as fault:
        tabulate(params(["pgd_at"], []), tmp_path)
    assert "\n" not in str(fault.value)
