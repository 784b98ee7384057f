"""The commands on other people's machines: terminals, line endings, a Python that ignores the folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import ROOT, copy, git


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_a_terminal_that_lacks_letters_ends_no_command(finished_pipeline: Path) -> None:
    for command in ("stages.tabulate", "dynat.audit", "dynat.accept", "dynat.runtime.tracking"):
        arguments = ["--all"] if command == "dynat.audit" else []
        done = python(finished_pipeline, "-m", command, *arguments, PYTHONIOENCODING="ascii")
        assert "Traceback" not in done.stderr, command
        assert done.returncode == 0 or command == "dynat.accept", done.stderr


def test_what_a_terminal_lacks_is_replaced_also_where_an_import_has_wrapped_the_streams(
    tmp_path: Path,
) -> None:
    code = "import sys, dynat.audit.__main__; from dynat.runtime.stage import begin; begin()"
    prints = "print('✓ ε'); print('✗', file=sys.stderr)"
    done = python(ROOT, "-c", f"{code}; {prints}", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("? ?\n", "?\n")


def test_a_stage_whose_reader_has_gone_ends_without_a_traceback_and_can_go_on(tmp_path: Path) -> None:
    printing = "[print('x' * 9000, flush=True) for _ in range(99)]"
    code = f"from dynat.runtime.stage import main; main(lambda: {printing})"
    command = f'({sys.executable} -c "{code}"; echo $? >{tmp_path}/status) | true'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr, (tmp_path / "status").read_text()) == ("", "75\n")


def test_a_clone_that_turns_line_endings_gets_the_committed_bytes(tmp_path: Path) -> None:
    names = [".gitattributes", "dvc.lock", "dvc.yaml", "metrics/tables/cells.json", "dynat/errors.py"]
    for name in names:
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_bytes((ROOT / name).read_bytes())
    git(tmp_path / "one", "init", "-q")
    git(tmp_path / "one", "add", "-A")
    git(tmp_path / "one", "-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "-qm", "all")
    turned = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf")
    git(tmp_path, *turned, "clone", "-q", "one", "two")
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize("command", ["stages.check", "stages.train", "dynat.audit", "dynat.accept"])
def test_a_python_that_ignores_the_folder_runs_no_other_code(tmp_path: Path, command: str) -> None:
    folder = copy(tmp_path / "repository")
    arguments = {"stages.train": ["digits", "dynat", "0"], "dynat.audit": ["--all"]}.get(command, [])
    done = python(folder, "-m", command, *arguments, PYTHONSAFEPATH="1", PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "unset PYTHONSAFEPATH" in line]
    assert str(ROOT) in line
    assert "Traceback" not in done.stderr
    assert not (folder / "data").exists()
