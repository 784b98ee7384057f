"""The modules that no closure lists change no output: each is swapped for a stub in real stages."""

import subprocess
import sys
from pathlib import Path

import pytest
from stages_under_fire import environment, hashes, write_params

from dynat.runtime.closure import EXCLUDED

pytestmark = pytest.mark.slow
STUBS = {  # that they can be called, and nothing else
    "dynat.runtime.tracking": """
class Tracker:
    def __init__(self, *_, **__): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __getattr__(self, name): return lambda *_, **__: None
""",
    "dynat.runtime.record": """
class RunRecord:
    def __init__(self, *_): self.values = {}
    def write(self, *_, **__): pass
""",
    "dynat.runtime.progress": """
from contextlib import contextmanager
def watched(items, *_): return items
@contextmanager
def counted(*_): yield lambda part: None, lambda count: None
""",
}
SWAP = """
import runpy, sys, types
name, text, sys.argv = sys.argv[1], sys.argv[2], sys.argv[3:]
if name:
    stub = sys.modules[name] = types.ModuleType(name)
    exec(text, vars(stub))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def outputs(folder: Path, module: str) -> dict[str, str]:
    """What training and evaluation write with ``module`` swapped, but for the record of the run."""
    write_params(folder, train__epochs=2)
    for stage in ("prepare", "train", "attack", "autoattack"):
        run = ["mini"] if stage == "prepare" else ["mini", "dynat", "0"]
        command = [sys.executable, "-c", SWAP, module, STUBS.get(module, ""), f"stages.{stage}", *run]
        done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = hashes(folder / "data", folder / "models", folder / "metrics")
    return {name: value for name, value in found.items() if "/runs/" not in name}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outputs(tmp_path_factory.mktemp("untouched"), "")


@pytest.mark.parametrize("module", EXCLUDED)
def test_outputs_are_the_same_without_it(module: str, untouched: dict[str, str], tmp_path: Path) -> None:
    assert len(untouched) > 8
    assert outputs(tmp_path, module) == untouched
