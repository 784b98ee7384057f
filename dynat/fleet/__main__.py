"""Run what ``dvc repro [TARGETS]`` would, one stage per GPU, on this machine or on a Ray cluster.

Ends with the dvc.lock and the outputs of a serial run. Exit status: 0 everything is done, 1 a stage failed,
2 something must be mended first, 75 stopped by a signal, the same command goes on. See docs/cluster.md.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dynat.config.params import load
from dynat.errors import UserError
from dynat.runtime.signals import graceful_stop
from dynat.runtime.stage import INTERRUPTED, begin

if TYPE_CHECKING:
    from dynat.fleet.driver import Driver


def main(arguments: list[str] | None = None) -> int:
    """Run the fleet; returns the exit status."""
    options = _options(arguments)
    try:
        begin()
        params = load()
        try:
            from dynat.fleet.cluster import Cluster
            from dynat.fleet.display import Display
            from dynat.fleet.driver import Driver
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; run this with: uv run --extra cluster") from None
        from dynat.fleet.dvc_stages import Pipeline
        from dynat.fleet.needs import processes

        processes(params.launch)
        root = Path.cwd()
        with _alone(root), graceful_stop() as stopping:
            pipeline = Pipeline(root, options.targets)
            cluster = Cluster(root, options.address, options.dashboard)
            try:
                driver = Driver(
                    pipeline,
                    params,
                    cluster,
                    Display(),
                    options.retries,
                    options.gpu_kind,
                    options.mixed,
                    stopping,
                )
                if cluster.dashboard:
                    print(f"dashboard: http://{cluster.dashboard}", file=sys.stderr)
                return _dry(driver) if options.dry else _run(driver)
            finally:
                cluster.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; mend it and run this again", file=sys.stderr)
        return 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dynat.fleet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help="stages, as for dvc repro; all by default")
    add("--dry", action="store_true", help="print the plan and what each stage needs, run nothing")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster, or auto; by default this machine alone")
    add("--retries", metavar="N", type=int, default=3, help="fruitless ones in a row after a fault of a node")
    add("--gpu-kind", metavar="NAME", help="use GPUs of this kind only, such as H100")
    add("--mixed", action="store_true", help="use GPUs of different kinds")
    add("--dashboard", action="store_true", help="start Ray's dashboard on this machine")
    options = parser.parse_args(arguments)
    if options.retries < 0:
        parser.error("--retries: N must not be negative")
    return options


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of the one fleet of a repository."""
    from dynat.fleet.worker import folder_of

    if not (root / ".dvc").is_dir():
        raise UserError(f"{root}: not the top of a DVC repository; go there")
    folder = folder_of(root)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock").acquire(timeout=0):
            (folder / "driver").write_text(f"{platform.node()}, process {os.getpid()}")
            yield
    except Timeout:
        other = (folder / "driver").read_text() if (folder / "driver").exists() else "unknown"
        raise UserError(f"another fleet works in this repository ({other}); wait for it or stop it") from None


def _run(driver: "Driver") -> int:
    driver.find_nodes()
    if fault := driver.cluster.without_server(driver.cluster.hosts):
        raise UserError(fault)
    going = driver.run()
    counts = driver.counts()
    print(f"{counts.done} of {counts.total} stages are done and recorded in dvc.lock")
    for name, why in driver.failed.items():
        print(f"failed: {name}: {why}")
    if driver.skipped:
        print(f"not run, since they depend on these: {', '.join(sorted(driver.skipped))}")
    if not going:
        print("stopped; the same command goes on from here")
        return INTERRUPTED
    return 1 if driver.failed else 0


def _dry(driver: "Driver") -> int:
    from dynat.fleet.display import duration
    from dynat.fleet.schedule import fitting

    driver.find_nodes()
    nodes = driver.slots.nodes.values()
    for node in nodes:
        kind = f" {node.kind}" if node.kind else ""
        print(f"node {node.name}: {node.cpus:g} cores, {node.gpus:g} GPUs{kind}")
    running, short, cached = set[str](), set[str](), set[str]()
    for name in driver.pipeline.stages:
        depends = driver.pipeline.upstream[name] & running
        restored = driver.pipeline.upstream[name] & cached
        if restored and not depends:
            cached.add(name)
            print(f"{name}: known once what it depends on is restored")
            continue
        state = "to run" if depends else driver.pipeline.state(name)
        cached |= {name} if state == "cached" else set()
        if state != "to run":
            print(f"{name}: {state}")
            continue
        running.add(name)
        each = driver.needs(name)
        wanted = f"{each.gpus:g} GPUs" if each.gpus else f"{each.cpus:g} cores".replace("inf", "all")
        try:
            fitting(each, nodes)
        except UserError as error:
            short.add(str(error))
        expected = duration(driver.durations.expected(driver.commands[name]))
        print(f"{name}: to run, {wanted}, about {expected}")
    print(f"{len(running)} of {len(driver.pipeline.stages)} stages to run")
    for line in sorted(short):
        print(f"resources fall short: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
