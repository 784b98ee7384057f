"""The audit on a real, small run: every link holds, and a word on the command line finds its cells."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tampering
import yaml
from pipelines import GIT, ROOT, commit, dvc, git
from tampering import ATTACK, CELL

from dynat.audit.__main__ import main
from dynat.audit.checks import _archive as archive_links
from dynat.config.params import DataSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning"),  # of a package that DVC uses
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cells(finished: Path) -> dict[str, Any]:
    """The index of the tables, in whose repository the test runs."""
    return dict(json.loads((finished / "metrics/tables/cells.json").read_text()))


def found(wanted: str, capsys: Capture) -> set[str]:
    """The cells that an audit without fault is of."""
    capsys.readouterr()
    assert main([wanted, "--json"]) == 0
    return {audit["cell"] for audit in json.loads(capsys.readouterr().out)}


def cloned(repository: Path, folder: Path, *options: str) -> Path:
    """A clone in ``folder``; by its URL, as Git ignores --depth for a path."""
    subprocess.run([*GIT, "clone", "-q", *options, repository.resolve().as_uri(), folder], check=True)
    return folder


def test_every_link_of_a_run_holds(finished: Path, capsys: Capture) -> None:
    assert main([CELL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert not [line for line in lines if line.startswith("✗")]
    assert any(line.startswith("✓ commit ") and "tree clean" in line for line in lines)
    assert any("MLflow run" in line and "finished" in line for line in lines)
    assert main(["--all"]) == 0
    assert "outputs are not here" not in capsys.readouterr().out


def test_a_fresh_clone_without_outputs_and_cache_holds_too(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    clone = cloned(finished, tmp_path / "clone")
    assert not (clone / "models").exists()
    monkeypatch.chdir(clone)
    assert main([CELL, "--deep"]) == 0
    output = capsys.readouterr().out
    assert "not here: models/digits/pgd_at/0" in output
    assert "dvc pull" in output
    assert main(["--all"]) == 0
    assert "stages whose outputs are not here" in capsys.readouterr().out


def test_json_says_the_same_as_the_lines(repository: Path, capsys: Capture) -> None:
    tampering.flip(repository / "models/digits/pgd_at/0/target.safetensors")
    assert main([CELL, "--json"]) == 1
    (audit,) = json.loads(capsys.readouterr().out)
    assert audit["cell"] == CELL
    assert audit["ok"] is False
    faults = [link for link in audit["links"] if link["state"] == "broken"]
    assert [fault["subject"] for fault in faults] == ["train_baseline@digits-pgd_at-0"]
    code = [detail for link in audit["links"] if link["kind"] == "commit" for detail in link["details"]]
    listed = json.loads((repository / "metrics/code/train.json").read_text())
    same = listed["modules"]["dynat.methods.step"]
    assert f"metrics/code/train.json dynat.methods.step: {same} then, {same} now" in code


def test_numbers_and_files_find_the_cells_that_print_them(cells: dict[str, Any], capsys: Capture) -> None:
    number = cells[CELL]["numbers"]["accuracy"]
    for wanted, known in (
        (number, CELL),
        (f"{ATTACK}.json", CELL),
        ("models/digits/pgd_at/1", "digits/pgd_at/1/aa"),
    ):
        printing = found(wanted, capsys)
        assert known in printing
        assert len(printing) < len(cells)


def test_files_that_a_number_comes_from_find_it_and_no_other(cells: dict[str, Any], capsys: Capture) -> None:
    own = {key for key in cells if key.startswith("digits/pgd_at/") and key.split("/")[2] in ("1", "mean")}
    union = {key for key in cells if key.split("/")[-1] in ("aa", "aa-apgd-ce", "all")}
    for wanted, known in (
        ("models/digits/pgd_at/1/target.safetensors", own),
        ("dynat/methods/step.py", {*cells}),
        ("dynat/evaluation/__init__.py", {*cells}),
        ("dynat/evaluation/autoattack.py", union),
    ):
        assert found(wanted, capsys) == known


def test_a_method_stands_for_its_cells_and_a_short_number_for_the_printed_one(
    cells: dict[str, Any], capsys: Capture
) -> None:
    numbers = {key: cell["numbers"]["accuracy"] for key, cell in cells.items()}
    number = next(number for number in numbers.values() if number.endswith("0"))
    for wanted, expected in (
        ("digits/pgd_at", {key for key in cells if key.startswith("digits/pgd_at/")}),
        (number.rstrip("0").rstrip("."), {key for key in cells if numbers[key] == number}),
    ):
        assert found(wanted, capsys) >= expected > set()


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("digits/pgd_at/7/aa", "no such cell, file or number"),
        ("nothing.json", "no such cell, file or number"),
        ("12.3456", "no such cell, file or number"),
        ("dynat/audit/link.py", "no such cell, file or number"),
        ("Digits/pgd_at/0/AA", "did you mean digits/pgd_at/0/aa?"),
        ("table1/DYNAT/aa", "the paper has 49.20 (Table 1, DYNAT, AA); uv run dvc exp run"),
        ("49.20", "(Table 1, DYNAT, AA)"),
        ("table1/DYNAT", "not reproduced here"),
        ("Digits/PGD_AT/0", "did you mean digits/pgd_at/0?"),
    ],
)
def test_no_such_cell_is_one_line_that_says_what_is_near_and_status_2(
    finished: Path, capsys: Capture, wanted: str, hint: str
) -> None:
    assert main([wanted]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {wanted}: ")
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "metrics/tables/cells.json").write_text("{"), "metrics/tables/cells.json"),
        (lambda folder: (folder / "metrics/tables/cells.json").unlink(), "metrics/tables/cells.json"),
        (tampering.cut_lock, "dvc.lock: cannot be read"),
    ],
)
def test_a_broken_index_of_the_tables_and_a_broken_lock_fail_every_number(
    repository: Path, capsys: Capture, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(repository)
    for wanted in (CELL, "--all"):
        assert main([wanted]) == 1
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_clone_whose_history_is_cut_names_no_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (repository / "notes.txt").write_text("nothing that a stage reads")
    commit(repository, "later")
    for depth, mark in (("1", "–"), ("9", "✓")):
        monkeypatch.chdir(cloned(repository, tmp_path / f"depth{depth}", "--depth", depth))
        assert main([CELL]) == 0
        output = capsys.readouterr().out
        assert ("git fetch --unshallow" in output) == (mark == "–")
        assert ("✓ commit " in output) == (mark == "✓")


def test_a_stage_that_no_number_needs_is_checked_with_all(repository: Path, capsys: Capture) -> None:
    path = repository / "dvc.yaml"
    pipeline = yaml.safe_load(path.read_text())
    pipeline["stages"]["extra"] = {
        "matrix": {"setting": "${settings}", "seed": "${seeds}"},
        "cmd": "mkdir -p metrics/extra && cp params.yaml metrics/extra/${item.setting}-${item.seed}.json",
        "deps": ["data/${item.setting}.safetensors", "dynat/evaluation/verdicts.py"],
        "outs": [{"metrics/extra/${item.setting}-${item.seed}.json": {"cache": False}}],
    }
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert main(["--all", "--json"]) == 0
    assert "never run, and in no number: extra@digits-0, extra@digits-1" in capsys.readouterr().out
    result = dvc(repository, "repro", "extra@digits-0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main(["--all"]) == 0
    capsys.readouterr()
    tampering.flip(repository / "metrics/extra/digits-0.json")
    assert main(["--all"]) == 1
    assert "metrics/extra/digits-0.json is not what the stage wrote" in capsys.readouterr().out


def test_a_cell_takes_less_than_two_seconds(finished: Path) -> None:
    main([CELL])  # imports
    start = os.times()
    main([CELL])
    end = os.times()
    assert sum(end[:4]) - sum(start[:4]) < 2  # of this process and its children


def test_the_circumstances_say_how_often_a_training_was_resumed(repository: Path, capsys: Capture) -> None:
    path = repository / "metrics/runs/train/digits/pgd_at/0.json"
    record = json.loads(path.read_text())
    for entries, said in (
        ({"resumed": 0}, "never resumed"),
        ({"resumed": 3, "resumed_from_epoch": 2}, "resumed 3 times, last at epoch 2"),
        ({"resumed": 1, "resumed_from_epoch": None}, "resumed 1 time;"),
    ):
        path.write_text(json.dumps(record | entries))
        main([CELL])
        assert said in capsys.readouterr().out


def test_code_accepted_by_proof_is_said_not_to_have_run(repository: Path, capsys: Capture) -> None:
    path = repository / "metrics/runs/train/digits/pgd_at/0.json"
    code = tampering.entry(repository, "train_baseline@digits-pgd_at-0", "deps", "metrics/code/train.json")[
        "md5"
    ]
    proof = {
        "code": code,
        "from": "a" * 32,
        "commit": "c" * 40,
        "compared": ["2 steps"],
        "date": "2026-11-26",
    }
    first = proof | {"code": "a" * 32, "from": "b" * 32}
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"accepted": [first, proof]}))
    assert main([CELL]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("≈ ")]
    assert len(lines) == 2
    assert "this code was not run; it gave the same bits as the recorded code aaaaaaaa" in lines[0]
    assert lines[0].endswith(" in 2 steps")
    assert main(["--all"]) == 0
    assert "1 stages accepted by proof, not run by this code" in capsys.readouterr().out
    path.write_text(json.dumps(record | {"accepted": [first]}))
    assert main([CELL]) == 1
    assert f"no proof in it is of the code {code[:8]} in dvc.lock" in capsys.readouterr().out


def test_the_commit_that_brought_an_entry_is_found_behind_many_later_ones(
    repository: Path, capsys: Capture
) -> None:
    lock = repository / "dvc.lock"
    entries = lock.read_text()
    lock.unlink()
    commit(repository, "lost")
    lock.write_text(entries)
    brought = commit(repository, "restored")
    for number in range(40):
        lock.write_text(f"{entries}  other{number}:\n    cmd: 'true'\n")
        git(repository, "commit", "-qam", f"other {number}")
    assert main([CELL]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✓ commit ")]
    assert [line.split()[2] for line in lines] == [brought[:10]]


def test_an_experiment_is_named_with_its_commit(repository: Path, capsys: Capture) -> None:
    tampering.flip(repository / f"{ATTACK}.witness.safetensors")  # another result, which saving records
    result = dvc(repository, "exp", "save", "-n", "other-witness")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main([CELL]) == 0
    output = capsys.readouterr().out
    assert "✓ attack_baseline@digits-pgd_at-0: from the experiment other-witness (" in output


def test_audit_imports_neither_torch_nor_mlflow_nor_matplotlib() -> None:
    code = (
        "import sys; import dynat.audit.crate; from dynat.audit.__main__ import main\n"
        "main(['--all'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'mlflow', 'matplotlib')))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert " cells: " in result.stdout


def test_own_data_at_hand_is_held_against_the_hash_in_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAT_DATA_MIRROR", str(tmp_path))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    archive, content = tmp_path / "mine.zip", b"images"
    spec = {"source": "image_folder", "classes": 2, "archive": "mine.zip"}
    data = DataSpec(**spec, sha256=hashlib.sha256(content).hexdigest())
    study = SimpleNamespace(params=SimpleNamespace(study={"mine": SimpleNamespace(data=data)}))

    def state() -> str:
        (link,) = archive_links(study, "prepare@mine")  # type: ignore[arg-type]
        assert link.kind == "data"
        return link.state

    assert state() == "absent"
    archive.write_bytes(content)
    assert state() == "good"
    archive.write_bytes(content + b" replaced")
    assert state() == "broken"
    archive.unlink()
    (archive / "train").mkdir(parents=True)
    assert state() == "broken"


def test_a_project_within_a_larger_repository_is_audited_as_one_of_its_own(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    outer, project = tmp_path / "outer", tmp_path / "outer/of ours/prój"
    project.parent.mkdir(parents=True)
    shutil.rmtree(repository / ".git")
    repository.rename(project)
    (outer / "notes.txt").write_text("of another project")
    git(outer, "init", "-q")
    git(outer, "add", "-A")
    commit(outer, "all at once")
    monkeypatch.chdir(project)
    assert main([CELL]) == 0
    said = capsys.readouterr().out
    assert "tree clean" in said
    assert "in no commit" not in said


@pytest.mark.parametrize("reason", ["fatal: detected dubious ownership in repository at '/data'", "no git"])
def test_a_git_that_does_not_answer_fails_the_audit_with_its_reason(
    reason: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if reason != "no git":
        (tmp_path / "git").write_text(f'#!/bin/sh\necho "{reason}" >&2\nexit 128\n')
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([CELL]) == 1
    line = next(each for each in capsys.readouterr().out.splitlines() if "Git does not answer" in each)
    assert reason in line or "No such file" in line
