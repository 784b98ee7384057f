"""A small repository whose stages sleep instead of computing, and a Ray cluster of several nodes here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipelines
import yaml

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0  # on a busy machine; a process that is waited for in vain costs as much
SLEEPER = '''"""Sleep, resume after SIGTERM, write what follows from the inputs; keep a journal of it all."""
import hashlib, json, os, signal, sys, time
from pathlib import Path
name, seconds, *inputs = sys.argv[1:]
journal, state = Path("journal.txt"), Path(".dvc/tmp", f"state-{name}")
def note(what):
    own = [os.environ.get(variable) for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    line = [what, name, *own, os.getpid()]
    with open(journal, "a") as file:
        file.write(json.dumps(line) + "\\n")
def stop(*_):
    note("stopped")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
note("start")
if name == "faulty":
    print("epoch 0", flush=True)
    sys.exit("this stage always fails")
slept = float(state.read_text()) if state.exists() else 0.0
while slept < float(seconds):
    time.sleep(0.1)
    slept += 0.1
    half = state.with_suffix(".half")  # a power cut while it writes leaves the state before
    half.write_text(str(slept))
    half.replace(state)
    if round(10 * slept) % 5 == 0:
        print("epoch", round(2 * slept), flush=True)
state.unlink(missing_ok=True)
text = json.dumps([name, *(Path(each).read_text() for each in inputs)])
Path("out").mkdir(exist_ok=True)
Path("out", name).write_text(hashlib.sha256(text.encode()).hexdigest())
note("end")
'''


def repository(folder: Path, *, seconds: float = 2.0, faulty: bool = False, wide: int = 4) -> Path:
    """``first``, then ``wide`` stages a, b, ... with a GPU each and their evaluations, then ``last``."""
    folder.mkdir()
    shutil.copytree(ROOT / "dynat", folder / "dynat", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    for name in (".gitignore", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvcignore").write_text("dynat\n")
    (folder / "sleep.py").write_text(SLEEPER)
    (folder / "input").write_text("1")

    def stage(name: str, took: float, inputs: list[str], gpus: int = 0) -> dict[str, Any]:
        own = {"cache": False} if name.endswith("2") else {}
        return {
            "cmd": " ".join(["python sleep.py", name, str(took), *inputs]),
            "deps": ["sleep.py", *inputs],
            "outs": [{f"out/{name}": own}] if own else [f"out/{name}"],
            "meta": {"gpus": gpus, "cpus": 0.5},
        }

    stages = {"first": stage("first", 0.1, ["input"])}
    for name in "abcdefgh"[:wide]:
        stages[name] = stage(name, seconds, ["out/first"], 1)
        stages[f"{name}2"] = stage(f"{name}2", 0.1, [f"out/{name}"])
    if faulty:
        stages["faulty"] = stage("faulty", 0, ["out/first"])
        stages["after"] = stage("after", 0, ["out/faulty"])
    stages["last"] = stage("last", 0.1, [f"out/{name}2" for name in "abcdefgh"[:wide]])
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text() + "/journal.txt\n/out/\n")
    pipelines.git(folder, "init", "-q", "--template=")
    pipelines.commit(folder, "sleepers")
    return folder


def environment(**more: str) -> dict[str, str]:
    return pipelines.dvc_environment() | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"} | more


def start(folder: Path, *options: str, **more: str) -> "subprocess.Popen[str]":
    """A fleet in ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "dynat.fleet", *options],
        cwd=folder,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", patience: float = PATIENCE_S) -> tuple[int, str]:
    """Exit status and all that it printed."""
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def run(folder: Path, *options: str, **more: str) -> tuple[int, str]:
    return finish(start(folder, *options, **more))


def journal(folder: Path) -> list[list[Any]]:
    """What, name, GPUs, OMP_NUM_THREADS, pid of each event so far."""
    file = folder / "journal.txt"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def begun(folder: Path, name: str, what: str = "start") -> int:
    return sum(each[:2] == [what, name] for each in journal(folder))


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value, "waited in vain"
    return value


def parents(pid: int) -> list[int]:
    """``pid`` and its ancestors."""
    found = []
    while pid > 1:
        found.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def ray_worker_of(folder: Path, name: str) -> int:
    """The pid of Ray's process that runs the stage ``name``."""
    pid = [each[4] for each in journal(folder) if each[:2] == ["start", name]][-1]
    return next(each for each in parents(pid) if "ray::" in Path(f"/proc/{each}/cmdline").read_text())


@contextmanager
def cluster(**nodes: dict[str, Any]) -> Iterator[Any]:
    """Several nodes on this machine; ``nodes``: name -> what Cluster.add_node takes. Quick to see a death."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    from ray.cluster_utils import Cluster

    quick = {
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 4,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        found.named = {name: found.add_node(**options) for name, options in nodes.items()}
        yield found
    finally:
        found.shutdown()


def committed(folder: Path) -> dict[str, bytes]:
    """Name -> content of dvc.lock and of all outputs."""
    files = [folder / "dvc.lock", *sorted((folder / "out").iterdir())]
    return {file.name: file.read_bytes() for file in files}
