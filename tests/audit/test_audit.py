"""The audit on a real, small run: it passes what was run and names what was changed since."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import crates
import pytest
import tampering
import torch
import yaml
from pipelines import copy, dvc
from safetensors.torch import load_file, save_file
from tampering import ATTACK, CELL, GIT

from dynat.audit.__main__ import main

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # of a package that DVC uses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One method and two seeds through the whole pipeline, committed."""
    folder = copy(tmp_path_factory.mktemp("audit") / "repository")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {"baselines": ["pgd_at"], "variants": [], "seeds": [0, 1]}
    study = params["study"]["digits"]
    study["train"]["epochs"], study["data"]["test"] = 2, 60  # some samples robust, some broken
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    result = dvc(folder, "repro")
    assert result.returncode == 0, result.stdout + result.stderr
    subprocess.run([*GIT, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*GIT, "commit", "-qm", "run"], cwd=folder, check=True)
    return folder


@pytest.fixture
def repository(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    shutil.copytree(run, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def cloned(repository: Path, folder: Path, *options: str) -> Path:
    """A clone in ``folder``; by its URL, as Git ignores --depth for a path."""
    source = repository.resolve().as_uri()
    subprocess.run(["git", "clone", "-q", *options, source, folder], check=True)
    return folder


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The audit in a process of its own, which may pin the CPU."""
    command = [sys.executable, "-m", "dynat.audit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def as_json(wanted: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The output of an audit as data."""
    capsys.readouterr()
    main([wanted, "--json"])
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- passes


@slow
def test_every_link_of_a_run_holds(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CELL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert not [line for line in lines if line.startswith("✗")]
    assert any(line.startswith("✓ commit ") and "tree clean" in line for line in lines)
    assert any("MLflow run" in line and "finished" in line for line in lines)
    assert main(["--all"]) == 0


@slow
def test_a_fresh_clone_without_outputs_and_cache_holds_too(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = cloned(repository, tmp_path / "clone")
    assert not (clone / "models").exists()
    monkeypatch.chdir(clone)
    assert main([CELL]) == 0
    assert "not here: models/digits/pgd_at/0" in capsys.readouterr().out
    assert main(["--all"]) == 0
    deep = process(clone, CELL, "--deep")
    assert deep.returncode == 0
    assert "dvc pull" in deep.stdout


@slow
def test_deep_and_replay_hold(repository: Path) -> None:
    result = process(repository, CELL, "--deep", "--replay", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "fool the stored weights" in result.stdout
    assert "withstand pgd20" in result.stdout
    assert "the first 3 steps give the recorded losses to the bit" in result.stdout


@slow
def test_json_says_the_same_as_the_lines(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tampering.flip(repository / "models/digits/pgd_at/0/target.safetensors")
    assert main([CELL, "--json"]) == 1
    (audit,) = json.loads(capsys.readouterr().out)
    assert audit["cell"] == CELL
    assert audit["ok"] is False
    faults = [link for link in audit["links"] if link["state"] == "broken"]
    assert [fault["subject"] for fault in faults] == ["train_baseline@digits-pgd_at-0"]
    code = [detail for link in audit["links"] if link["kind"] == "commit" for detail in link["details"]]
    md5 = hashlib.md5((repository / "dynat/methods/step.py").read_bytes()).hexdigest()
    assert f"dynat/methods/step.py: {md5} then, {md5} now" in code


@slow
def test_numbers_and_files_find_the_cells_that_print_them(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((repository / "metrics/tables/cells.json").read_text())
    number = cells[CELL]["numbers"]["accuracy"]
    for wanted, known in (
        (number, CELL),
        (f"{ATTACK}.json", CELL),
        ("models/digits/pgd_at/1", "digits/pgd_at/1/aa"),
    ):
        assert main([wanted, "--json"]) == 0
        found = [audit["cell"] for audit in json.loads(capsys.readouterr().out)]
        assert known in found
        assert len(found) < len(cells)


@slow
@pytest.mark.parametrize("wanted", ["digits/pgd_at/7/aa", "nothing.json", "12.3456", "table1/DYNAT/aa"])
def test_no_such_cell_is_one_line_and_status_2(
    repository: Path, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    assert main([wanted]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert wanted in error
    assert error.count("\n") == 1


@slow
def test_what_is_not_found_says_what_is_near_and_what_the_paper_has(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wanted, hint in (
        ("Digits/pgd_at/0/AA", "did you mean digits/pgd_at/0/aa?"),
        ("table1/DYNAT/aa", "the paper has 49.20 (Table 1, DYNAT, AA); uv run dvc exp run"),
        ("49.20", "(Table 1, DYNAT, AA)"),
        ("table1/DYNAT", "not reproduced here"),
        ("Digits/PGD_AT/0", "did you mean digits/pgd_at/0?"),
    ):
        assert main([wanted]) == 2
        assert hint in capsys.readouterr().err


@slow
def test_a_method_stands_for_its_cells_and_a_short_number_for_the_printed_one(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((repository / "metrics/tables/cells.json").read_text())
    numbers = {key: cell["numbers"]["accuracy"] for key, cell in cells.items()}
    number = next(number for number in numbers.values() if number.endswith("0"))
    for wanted, expected in (
        ("digits/pgd_at", {key for key in cells if key.startswith("digits/pgd_at/")}),
        (number.rstrip("0").rstrip("."), {key for key in cells if numbers[key] == number}),
    ):
        assert main([wanted, "--json"]) == 0
        found = {audit["cell"] for audit in json.loads(capsys.readouterr().out)}
        assert found >= expected > set()


@slow
def test_a_clone_whose_history_is_cut_names_no_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "notes.txt").write_text("nothing that a stage reads")
    subprocess.run([*GIT, "add", "notes.txt"], cwd=repository, check=True)
    subprocess.run([*GIT, "commit", "-qm", "later"], cwd=repository, check=True)
    for depth, mark in (("1", "–"), ("9", "✓")):
        monkeypatch.chdir(cloned(repository, tmp_path / f"depth{depth}", "--depth", depth))
        assert main([CELL]) == 0
        output = capsys.readouterr().out
        assert ("git fetch --unshallow" in output) == (mark == "–")
        assert ("✓ commit " in output) == (mark == "✓")


@slow
def test_outputs_that_a_clone_lacks_are_counted(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--all"]) == 0
    assert "outputs are not here" not in capsys.readouterr().out
    monkeypatch.chdir(cloned(repository, tmp_path / "clone"))
    assert main(["--all"]) == 0
    assert "stages whose outputs are not here" in capsys.readouterr().out


@slow
def test_a_broken_index_of_the_tables_is_a_broken_link(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("{", None):
        index = repository / "metrics/tables/cells.json"
        index.unlink() if content is None else index.write_text(content)
        assert main(["--all"]) == 1
        assert capsys.readouterr().err.startswith("error: metrics/tables/cells.json")


@slow
def test_files_that_a_number_comes_from_find_it_and_no_other(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads((repository / "metrics/tables/cells.json").read_text())
    own = {key for key in cells if key.split("/")[2] in ("1", "mean")}
    for wanted, known in (
        ("models/digits/pgd_at/1/target.safetensors", own),
        ("dynat/methods/step.py", {*cells}),
        ("dynat/evaluation/autoattack.py", {key for key in cells if key.split("/")[-1] in ("aa", "all")}),
    ):
        assert main([wanted, "--json"]) == 0
        assert {audit["cell"] for audit in json.loads(capsys.readouterr().out)} == known


@slow
def test_a_stage_that_no_number_needs_is_checked_with_all(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "dvc.yaml"
    pipeline = yaml.safe_load(path.read_text())
    pipeline["stages"]["extra"] = {
        "matrix": {"setting": "${settings}", "seed": "${seeds}"},
        "cmd": "mkdir -p metrics/extra && cp params.yaml metrics/extra/${item.setting}-${item.seed}.json",
        "deps": ["data/${item.setting}.safetensors", "dynat/evaluation/verdicts.py"],
        "outs": [{"metrics/extra/${item.setting}-${item.seed}.json": {"cache": False}}],
    }
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    assert main(["--all"]) == 0
    assert "never run, and in no number: extra@digits-0, extra@digits-1" in as_json("--all", capsys)
    result = dvc(repository, "repro", "extra@digits-0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main(["--all"]) == 0
    capsys.readouterr()
    tampering.flip(repository / "metrics/extra/digits-0.json")
    assert main(["--all"]) == 1
    assert "metrics/extra/digits-0.json is not what the stage wrote" in capsys.readouterr().out


@slow
def test_a_cell_takes_less_than_two_seconds(repository: Path) -> None:
    main([CELL])  # imports
    start = time.process_time()
    main([CELL])
    assert time.process_time() - start < 2


def test_audit_imports_neither_torch_nor_mlflow_nor_matplotlib() -> None:
    code = (
        "import sys; import dynat.audit.evidence, dynat.audit.crate; from dynat.audit.__main__ import main\n"
        "main(['--all'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'mlflow', 'matplotlib')))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert " cells: " in result.stdout


# ------------------------------------------------------------------------------------------------- tampering


@slow
@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (tampering.cut_metric, f"{ATTACK}.json: cannot be read"),
        (tampering.cut_lock, "dvc.lock: cannot be read"),
        (tampering.table, "metrics/tables/digits.md: line"),
        (tampering.cells, "its text is '99.99 [99.9, 100.0]', the verdicts give"),
        (tampering.metric, "/best/pgd20/accuracy says"),
        (tampering.verdicts, f"{ATTACK}.verdicts.json is not what the stage wrote"),
        (tampering.weights, "models/digits/pgd_at/0 is not what the stage wrote"),
        (tampering.data, "data/digits.safetensors is not what the stage wrote"),
        (tampering.lock, "used another data/digits.safetensors than prepare@digits wrote"),
        (tampering.code, "dynat/methods/step.py has changed"),
        (tampering.parameter, "study.digits.train.lr = 0.05 (params.yaml: 0.06)"),
        (tampering.command, "dvc.yaml says 'python -m stages.attack digits pgd_at 0'"),
        (tampering.other_seed, f"{ATTACK}.json is not what the stage wrote"),
        (tampering.other_seed, "metrics/runs/train/digits/pgd_at/0.json: is of the weights"),
        (tampering.stage_never_run, "has no entry in dvc.lock: it was never run"),
        (tampering.code_after_commit, "the tree was not clean"),
        (tampering.lock_without_dependency, "the dependency dynat/methods/step.py is not in dvc.lock"),
        (tampering.lock_without_output, f"the output {ATTACK}.verdicts.json is not in dvc.lock"),
        (tampering.metric_removed, f"{ATTACK}.json is missing"),
        (tampering.record_of_other_seed, "0.json: is the record of train_baseline@digits-pgd_at-1"),
        (tampering.failed_mlflow_run, "is FAILED"),
        (tampering.mlflow_run_of_other_weights, "is FINISHED, of the weights 0000000000"),
    ],
)
def test_what_was_changed_is_named(
    repository: Path, capsys: pytest.CaptureFixture[str], tamper: Callable[[Path], None], said: str
) -> None:
    tamper(repository)
    cell = "digits/pgd_at/mean/pgd20" if tamper is tampering.table else CELL
    assert main([cell]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert any(said in line for line in found), found
    assert main(["--all"]) == 1
    assert any(said in line for line in capsys.readouterr().out.splitlines())


@slow
def test_a_number_changed_in_what_dvc_compares_is_named_with_all(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "metrics/tables/summary/digits/pgd_at.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aa": 99.0}, indent=1) + "\n")
    assert main(["--all"]) == 1
    assert "metrics/tables/summary/digits/pgd_at.json: line" in capsys.readouterr().out


@slow
def test_a_row_whose_stage_was_never_run_is_no_number(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "metrics/tables/cells.json"
    found = json.loads(path.read_text())
    invented = json.loads(json.dumps(found[CELL]).replace("pgd_at/0", "trades/0"))
    path.write_text(json.dumps({**found, "digits/trades/0/pgd20": invented}))
    assert main(["digits/trades/0/pgd20"]) == 1
    assert "no stage of dvc.yaml writes it" in capsys.readouterr().out


@slow
def test_a_stage_rerun_but_not_tabulated_is_named(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params["study"]["digits"]["attack"]["seed"] = 5
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    result = dvc(repository, "repro", "attack_baseline@digits-pgd_at-0", "attack_baseline@digits-pgd_at-1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main([CELL]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("✗ tabulate: used another content of metrics/attack") for line in lines), lines


@slow
def test_a_witness_outside_the_ball_is_refused(repository: Path) -> None:
    path = repository / f"{ATTACK}.witness.safetensors"
    tensors = load_file(path)
    images = tensors["best/pgd20/images"]
    assert len(images), "the run has nothing to tamper with"
    images[0] = torch.where(images[0] > 0.5, images[0] - 0.3, images[0] + 0.3)
    save_file(tensors, path)
    result = process(repository, CELL, "--deep")
    assert result.returncode == 1
    assert "1 adversarial images lie outside the ball of" in result.stdout


@slow
@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (tampering.witness_beyond_black, "1 adversarial images leave [0,1]"),
        (tampering.witness_without_attack, "adversarial images are classified right by the stored weights"),
        (tampering.witness_dropped, "1 samples are called broken without a witness"),
        (tampering.all_called_robust, "random robust samples withstand pgd20 again"),
        (tampering.weights, "is of other weights than"),
    ],
)
def test_evidence_that_does_not_hold_is_refused(
    repository: Path, forge: Callable[[Path], None], said: str
) -> None:
    forge(repository)
    result = process(repository, CELL, "--deep")
    assert result.returncode == 1
    found = [line for line in result.stdout.splitlines() if line.startswith("✗")]
    assert any(said in line for line in found), result.stdout + result.stderr


@slow
def test_a_broken_sample_called_robust_is_refuted_though_all_files_agree(repository: Path) -> None:
    """Verdict, metric, tables and dvc.lock forged together: hashes hold, the witness does not."""
    from dynat.evaluation.verdicts import accuracy, decode, encode

    witness = load_file(repository / f"{ATTACK}.witness.safetensors")["best/pgd20/indices"]
    assert len(witness)
    verdict_file, metric_file = (repository / f"{ATTACK}{suffix}" for suffix in (".verdicts.json", ".json"))
    found, stated = json.loads(verdict_file.read_text()), json.loads(metric_file.read_text())
    evidence = found["best"]["pgd20"]
    flags = decode(evidence["robust"], evidence["n"])
    flags[int(witness[0])] = True
    evidence["robust"], stated["best"]["pgd20"] = encode(flags), accuracy(flags)
    verdict_file.write_text(json.dumps(found, indent=1) + "\n")
    metric_file.write_text(json.dumps(stated, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "stages.tabulate"], cwd=repository, check=True)
    result = dvc(repository, "commit", "-f")
    assert result.returncode == 0, result.stdout + result.stderr
    assert process(repository, CELL).returncode == 0, "hashes alone cannot tell"
    deep = process(repository, CELL, "--deep")
    assert deep.returncode == 1
    assert "1 samples are called robust and have a witness" in deep.stdout


@slow
@pytest.mark.parametrize("forge", [lambda loss: loss * 1.01, lambda loss: math.nextafter(loss, math.inf)])
def test_a_training_that_did_not_happen_is_not_replayed(
    repository: Path, forge: Callable[[float], float]
) -> None:
    path = repository / "models/digits/pgd_at/0/trace.csv"
    rows = path.read_text().splitlines()
    target, guide = rows[2].split(",")
    path.write_text("\n".join([*rows[:2], f"{forge(float(target))},{guide}", *rows[3:]]) + "\n")
    result = process(repository, CELL, "--replay", "3")
    assert result.returncode == 1
    assert "✗ replay digits/pgd_at/0" in result.stdout


@slow
def test_a_training_of_several_processes_is_said_not_to_be_replayed(repository: Path) -> None:
    path = repository / "metrics/runs/train/digits/pgd_at/0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    result = process(repository, CELL, "--replay", "3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not repeated: 2 processes trained it" in result.stdout


def test_the_circumstances_say_how_often_a_training_was_resumed(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


@slow
def test_crate_links_the_run_to_every_result_file_by_its_hash(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("rocrate", reason="needs the extra crate")
    folder = tmp_path / "crate"
    assert main([CELL, "--crate", str(folder)]) == 0
    graph = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    root = entities["./"]
    assert {"@id": "https://w3id.org/ro/wfrun/workflow/0.5"} in root["conformsTo"]
    action = entities[root["mentions"]["@id"]]
    assert action["instrument"] == root["mainEntity"] == {"@id": "dvc.yaml"}
    results = [entities[result["@id"]] for result in action["result"]]
    files = [result for result in results if result["@type"] == "File"]
    assert f"{ATTACK}.verdicts.json" in {file["@id"] for file in files}
    for file in files:
        content = (repository / file["@id"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert (folder / file["@id"]).read_bytes() == content
    assert main([CELL, "--crate", str(folder)]) == 2  # not empty any more


@slow
def test_the_profiles_validator_accepts_the_crate_and_no_spoilt_one(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rocrate", reason="needs the extra crate")
    pytest.importorskip("rocrate_validator", reason="needs roc-validator of the group dev")
    folder = tmp_path / "crate"
    assert main(["--all", "--crate", str(folder)]) == 0
    assert crates.faults(folder, "required") == []
    metadata = folder / "ro-crate-metadata.json"
    whole = json.loads(metadata.read_text())
    for entity, key in (("#run", "instrument"), ("./", "mainEntity"), ("dvc.yaml", "programmingLanguage")):
        graph = [
            {name: value for name, value in each.items() if each["@id"] != entity or name != key}
            for each in whole["@graph"]
        ]
        metadata.write_text(json.dumps({**whole, "@graph": graph}))
        assert crates.faults(folder, "required"), f"{entity} without {key}"


@slow
def test_crate_takes_no_file_from_outside_the_repository(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("rocrate", reason="needs the extra crate")
    (tmp_path / "secret").write_text("secret")
    path = repository / "metrics/tables/cells.json"
    found = json.loads(path.read_text())
    found[CELL]["sources"][0]["verdicts"] = "../secret"
    path.write_text(json.dumps(found))
    assert main([CELL, "--crate", str(tmp_path / "crate")]) == 2
    assert not (tmp_path / "crate").exists()


@slow
def test_the_commit_that_brought_an_entry_is_found_behind_many_later_ones(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = repository / "dvc.lock"
    entries = lock.read_text()

    def commit(message: str) -> str:
        subprocess.run([*GIT, "commit", "-qam", message], cwd=repository, check=True)
        head = ["git", "rev-parse", "HEAD"]
        return subprocess.run(head, cwd=repository, check=True, capture_output=True, text=True).stdout[:10]

    lock.unlink()
    commit("lost")
    lock.write_text(entries)
    subprocess.run(["git", "add", "dvc.lock"], cwd=repository, check=True)
    found = commit("restored")
    for number in range(40):
        lock.write_text(f"{entries}  other{number}:\n    cmd: 'true'\n")
        commit(f"other {number}")
    assert main([CELL]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✓ commit ")]
    assert [line.split()[2] for line in lines] == [found]


@slow
def test_an_experiment_is_named_with_its_commit(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = dvc(repository, "exp", "run", "-n", "other-seed", "-S", "study.digits.attack.seed=7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert main([CELL]) == 0
    output = capsys.readouterr().out
    assert "from the experiment other-seed (" in output
