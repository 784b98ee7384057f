"""The fleet as a user starts it, on Ray nodes of this machine, with stages that sleep; what strikes it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fleets import (
    begun,
    cluster,
    committed,
    environment,
    finish,
    journal,
    parents,
    ray_worker_of,
    repository,
    run,
    start,
    until,
)
from pipelines import commit, duplicate, dvc
from stages_under_fire import small_disk

pytestmark = pytest.mark.slow
GPU = {"num_cpus": 4, "num_gpus": 2}
NAMESPACES = "needs namespaces, which this machine does not let us make"


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``dvc repro`` makes of the sleepers."""
    folder = repository(tmp_path_factory.mktemp("serial") / "r", seconds=0.1)
    assert dvc(folder, "repro").returncode == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return repository(tmp_path / "r")


def same_outputs(folder: Path, serial: Path) -> bool:
    return {k: v for k, v in committed(folder).items() if k != "dvc.lock"} == {
        k: v for k, v in committed(serial).items() if k != "dvc.lock"
    }


def test_stages_run_side_by_side_on_gpus_of_their_own_and_the_lock_is_the_serial_one(tmp_path: Path) -> None:
    folder, other = (repository(tmp_path / name, seconds=1.5) for name in ("fleet", "serial"))
    with cluster(node={"num_cpus": 8, "num_gpus": 4}) as nodes:
        status, output = run(folder, "--address", nodes.address, OMP_NUM_THREADS="7")
    assert status == 0, output
    assert dvc(other, "repro").returncode == 0
    assert committed(folder) == committed(other)
    events = journal(folder)
    gpus = [gpu for what, name, gpu, *_ in events if what == "start" and name in "abcd"]
    assert sorted(gpus) == ["0", "1", "2", "3"]
    first_end = next(place for place, each in enumerate(events) if each[:1] == ["end"] and each[1] in "abcd")
    assert sum(each[0] == "start" and each[1] in "abcd" for each in events[:first_end]) == 4
    assert {gpu for what, name, gpu, *_ in events if what == "start" and name not in "abcd"} == {""}
    assert {threads for what, *_, threads, _ in events if what == "start"} == {"7"}
    assert "up to date" in dvc(folder, "repro").stdout
    assert "10 of 10 stages are done" in output


def test_a_dry_run_tells_what_is_to_do_and_what_is_missing_and_does_nothing(folder: Path) -> None:
    with cluster(node={"num_cpus": 2}) as nodes:
        status, output = run(folder, "--dry", "--address", nodes.address)
        assert status == 0, output
        assert journal(folder) == []
        assert "a: to run, 1 GPUs" in output
        assert "resources fall short: 1 GPUs are needed at once, and no node has as many" in output
        assert dvc(folder, "repro", "first").returncode == 0
        _, output = run(folder, "--dry", "--address", nodes.address, "first")
        assert "first: unchanged" in output
        assert dvc(folder, "repro", "a2").returncode == 0
        shutil.rmtree(folder / "out")
        status, output = run(folder, "--dry", "--address", nodes.address, "a2")
        assert (status, "first: cached" in output) == (0, True), output
        assert "a2: known once what it depends on is restored" in output
        assert dvc(folder, "repro", "a2").returncode == 0
        assert run(folder, "--address", nodes.address)[0] == 1  # the others cannot be placed


def test_a_failing_stage_stops_only_what_depends_on_it(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r", seconds=0.2, faulty=True)
    with cluster(node=GPU) as nodes:
        status, output = run(folder, "--address", nodes.address)
    assert status == 1, output
    assert (
        "failed: faulty: exit status 1: this stage always fails (log: .dvc/tmp/fleet/logs/faulty.log)"
        in output
    )
    assert "not run, since they depend on these: after" in output
    assert begun(folder, "faulty") == 2, "it got further once, and then no more"
    assert begun(folder, "last", "end") == 1


FILL = """
with open("small/full", "wb") as file:
    for _ in range(64):
        file.write(4096 * b"x")
        file.flush()
"""


def test_a_full_disk_fails_the_stage_by_name_and_nothing_half_written_is_taken_over(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r", seconds=0.2, wide=1)
    (folder / "fill.py").write_text(FILL)
    plan = yaml.safe_load((folder / "dvc.yaml").read_text())
    plan["stages"]["full"] = {"cmd": "python fill.py", "deps": ["fill.py"], "outs": ["small/full"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    with (folder / ".gitignore").open("a") as file:
        file.write("/small\n")
    commit(folder, "a stage that needs space")
    with small_disk(folder / "small", 65536) as remount, cluster(node=GPU) as nodes:
        status, output = run(folder, "--address", nodes.address)
        assert status == 1, output
        (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
        assert line.startswith("failed: full: exit status 1: OSError: [Errno 28] No space left on device")
        assert "(log: .dvc/tmp/fleet/logs/full.log)" in line
        assert "No space left" in (folder / ".dvc/tmp/fleet/logs/full.log").read_text()
        assert "full" not in yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
        half = {path.stat().st_size for path in (folder / ".dvc/cache").rglob("*") if path.is_file()}
        assert max(half) < 4096  # what the other stages wrote, and the records of their runs
        remount("size=1m")
        status, output = run(folder, "--address", nodes.address)
        assert status == 0, output
        assert (folder / "small/full").read_bytes() == 64 * 4096 * b"x"
    assert begun(folder, "a") == 1


def test_a_worker_that_is_killed_costs_only_what_was_not_saved(folder: Path, serial: Path) -> None:
    with cluster(node=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "a"))
        time.sleep(1)
        os.kill(ray_worker_of(folder, "a"), signal.SIGKILL)
        status, output = finish(process)
    assert status == 0, output
    assert same_outputs(folder, serial)
    assert (begun(folder, "a"), begun(folder, "a", "stopped")) == (2, 1)
    assert all(begun(folder, name) == 1 for name in ("first", "a2", "b", "c", "d", "last"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "freezes"])
def test_the_stages_of_a_lost_node_go_on_elsewhere(how: signal.Signals, tmp_path: Path, serial: Path) -> None:
    folder = repository(tmp_path / "r", seconds=10)  # longer than it takes to see that a node does not answer
    with cluster(one=GPU, two=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "a"))
        time.sleep(0.5)
        raylets = {each.all_processes["raylet"][0].process.pid for each in nodes.named.values()}
        line = parents(ray_worker_of(folder, "a"))
        raylet = next(pid for pid in line if pid in raylets)
        struck = [raylet]
        if how == signal.SIGSTOP:
            children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
            struck += [int(each) for each in children]
        for pid in struck:
            os.kill(pid, how)
        status, output = finish(process)
        for pid in struck if how == signal.SIGSTOP else ():
            os.kill(pid, signal.SIGKILL)
    assert status == 0, output
    assert same_outputs(folder, serial)
    assert "tried again" in output
    assert "aylet" not in output, "Ray's own lines are for its log"
    assert all(begun(folder, name, "end") == 1 for name in ("first", "a", "b", "c", "d", "last"))


def test_when_the_last_node_has_gone_the_stages_wait_for_another(tmp_path: Path, serial: Path) -> None:
    folder = repository(tmp_path / "r", seconds=10)
    with cluster(one=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "a"))
        os.kill(nodes.named["one"].all_processes["raylet"][0].process.pid, signal.SIGKILL)
        time.sleep(8)
        nodes.add_node(**GPU)
        status, output = finish(process)
    assert status == 0, output
    assert same_outputs(folder, serial)
    assert "stages wait for a node that has room for them" in output


def test_a_driver_that_is_killed_loses_nothing(folder: Path, serial: Path) -> None:
    with cluster(node=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until((folder / ".dvc/tmp/fleet/results/a.json").exists)  # its command has ended
        until(lambda: begun(folder, "c") + begun(folder, "d"))
        process.kill()
        process.communicate()
        status, output = run(folder, "--address", nodes.address)
    assert status == 0, output
    assert same_outputs(folder, serial)
    assert all(begun(folder, name, "end") == 1 for name in ("first", "a", "b", "c", "d", "last"))


def test_ctrl_c_stops_gracefully_and_the_same_command_goes_on(tmp_path: Path, serial: Path) -> None:
    folder = repository(tmp_path / "r", seconds=15, wide=4)
    with cluster(node=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "a"))
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        status, output = finish(process)
        assert status == 75, output
        assert "stopped; the same command goes on from here" in output
        assert begun(folder, "a", "stopped") == 1
        second = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "a") == 2)
        status, refused = run(folder, "--address", nodes.address)
        assert status == 2
        assert re.search(rf"another fleet works in this repository \(.*process {second.pid}\)", refused)
        beside = dvc(folder, "repro", "a")
        assert beside.returncode != 0
        assert f"PID {second.pid}" in beside.stderr
        status, output = finish(second, patience=120)
    assert status == 0, output
    assert same_outputs(folder, serial)


def test_an_edit_while_a_stage_runs_is_refused_by_name(folder: Path) -> None:
    with cluster(node=GPU) as nodes:
        process = start(folder, "--address", nodes.address)
        until(lambda: begun(folder, "b"))
        (folder / "sleep.py").write_text((folder / "sleep.py").read_text() + "# edited\n")
        status, output = finish(process)
    assert status == 1, output
    assert "b: FAILED: changed while it ran: sleep.py" in output
    assert "b:" not in (folder / "dvc.lock").read_text()


def test_a_launcher_for_all_gpus_is_refused_before_anything_else(folder: Path) -> None:
    params = (folder / "params.yaml").read_text()
    launcher = "launch: torchrun --standalone --nproc-per-node=gpu"
    (folder / "params.yaml").write_text(re.sub("^launch: python", launcher, params, flags=re.M))
    status, output = run(folder)
    assert status == 2
    assert output.startswith("error: params.yaml: launch: nproc-per-node=gpu: ")
    assert len(output.splitlines()) == 1


def test_gpus_of_different_kinds_are_refused_unless_they_are_asked_for(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r", seconds=0.2, wide=2)
    one, two = (GPU | {"resources": {f"accelerator_type:{kind}": 1}} for kind in ("H100", "A100"))
    with cluster(one=one, two=two) as nodes:
        status, output = run(folder, "--address", nodes.address)
        assert status == 2
        assert "different GPUs (A100, H100)" in output
        status, output = run(folder, "--address", nodes.address, "--gpu-kind", "V100")
        assert (status, "--gpu-kind V100" in output) == (2, True)
        assert run(folder, "--address", nodes.address, "--gpu-kind", "H100")[0] == 0


def in_namespaces(
    kinds: list[str], script: str, address: str, folder: Path, gpus: int = 0
) -> "subprocess.Popen[bytes]":
    """A Ray node behind namespaces of its own: another machine, as far as it can tell."""
    ray = (
        f"{Path(sys.executable).parent}/ray start --address={address} --num-cpus=4 --num-gpus={gpus} --block"
    )
    command = ["unshare", *kinds, "/bin/sh", "-c", f"{script}; exec {ray}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **quiet)  # type: ignore[call-overload,no-any-return]


def joined(nodes: object, count: int) -> None:
    """Wait until a cluster has so many nodes that can work."""
    code = (
        "import ray, sys, time; ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "def able(): return sum('CPU' in node['Resources'] for node in ray.nodes() if node['Alive'])\n"
        "while able() < int(sys.argv[2]): time.sleep(.2)"
    )
    command = [sys.executable, "-c", code, nodes.address, str(count)]  # type: ignore[attr-defined]
    subprocess.run(command, env=environment(), check=True, timeout=90, capture_output=True)


needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-m", "-u", "-p", "-f", "true"]).returncode != 0,
    reason=NAMESPACES,
)


@needs_namespaces
def test_two_machines_whose_process_ids_are_their_own_share_the_stages_and_one_may_lose_its_power(
    tmp_path: Path, serial: Path
) -> None:
    folder = repository(tmp_path / "r", seconds=10)
    with cluster(node=GPU) as nodes:
        own = ["-m", "-u", "-p", "-f", "--mount-proc"]
        other = in_namespaces(own, "hostname elsewhere", nodes.address, folder, gpus=2)
        try:
            joined(nodes, 2)
            server = "http://tracking.example.org:5000"  # which no sleeper asks
            process = start(folder, "--address", nodes.address, MLFLOW_TRACKING_URI=server)
            until(lambda: all(begun(folder, name) for name in "abcd"))
            time.sleep(0.5)
        finally:
            os.killpg(other.pid, signal.SIGKILL)  # its first process, with which the kernel ends all others
            other.wait()
        status, output = finish(process)
    assert status == 0, output
    assert same_outputs(folder, serial)
    lines = output.splitlines()
    there = {line.partition(":")[0] for line in lines if line.endswith("started on elsewhere GPU")}
    again = {line.partition(":")[0] for line in lines if line.endswith("; tried again")}
    assert len(there) == 2
    assert again == there
    for name in "abcd":
        assert begun(folder, name) == 1 + (name in there), "a stage ran twice, or not where it was"
        assert begun(folder, name, "end") == 1


@needs_namespaces
@pytest.mark.parametrize(
    ("kinds", "script", "message"),
    [
        (["-m", "-u"], "hostname elsewhere; mount -t tmpfs none .dvc/tmp", "node elsewhere does not share"),
        (["-u"], "hostname elsewhere", "MLFLOW_TRACKING_URI: 2 machines cannot share an SQLite file"),
    ],
    ids=["no shared files", "no server"],
)
def test_machines_that_cannot_work_together_are_refused(
    kinds: list[str], script: str, message: str, folder: Path
) -> None:
    (folder / ".dvc/tmp").mkdir(exist_ok=True)
    with cluster(node=GPU) as nodes:
        other = in_namespaces(kinds, script, nodes.address, folder)
        try:
            joined(nodes, 2)
            status, output = run(folder, "--address", nodes.address)
        finally:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()
    assert status == 2, output
    assert message in output
    assert journal(folder) == []


def test_real_stages_have_the_bytes_of_a_serial_run_and_the_audit_knows_the_node(
    finished_pipeline: Path, tmp_path: Path
) -> None:
    folder = duplicate(finished_pipeline, tmp_path / "r")
    before = {
        path: path.read_bytes()
        for path in [folder / "dvc.lock", *folder.glob("metrics/**/*")]
        if path.is_file() and "runs" not in path.parts
    }
    shutil.rmtree(folder / ".dvc/cache")
    shutil.rmtree(folder / "models")
    shutil.rmtree(folder / "metrics/attack")
    with cluster(node=GPU) as nodes:
        status, output = finish(start(folder, "--address", nodes.address), patience=600)
    assert status == 0, output
    assert {path: path.read_bytes() for path in before} == before
    commit(folder, "fleet")
    command = [sys.executable, "-m", "dynat.audit", "digits/dynat/0/pgd20"]
    audited = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    assert f"fleet node {os.uname().nodename}, attempt 1" in audited.stdout
