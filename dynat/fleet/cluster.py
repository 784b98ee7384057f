"""Ray: the nodes of one machine or of a cluster, what runs on them, and what must hold before that."""

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

SETTINGS = {  # Ray reads them when it is imported
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # below `uv run` it would build an environment per node
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # kills a stage for memory that a stranger uses
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a warning; worker.stage_environment sets the variable
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

import ray  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

from dynat.errors import UserError  # noqa: E402
from dynat.fleet import worker  # noqa: E402
from dynat.fleet.needs import Needs  # noqa: E402
from dynat.fleet.schedule import Node  # noqa: E402

PREFLIGHT_S = 120.0
Ref = ray.ObjectRef[Any]
KIND = "accelerator_type:"
SERVERS = ("http://", "https://", "databricks")


class Cluster:
    """The nodes that passed the preflight. ``warn`` gets a line for each that joins later and does not."""

    def __init__(self, root: Path, address: str | None, dashboard: bool) -> None:
        self.root = root
        self.nonce = secrets.token_hex(8)
        self._refused: set[str] = set()
        self._facts: dict[str, dict[str, Any]] = {}
        path = worker.folder_of(root) / "nonce"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.nonce)
        try:
            context = ray.init(
                address=address or "local",  # without one it would join whatever the last one left
                include_dashboard=dashboard if address is None else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="dynat",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--address {address}: {' '.join(str(error).split())[:200]}") from None
        self.dashboard: str = context.dashboard_url or ""

    def refresh(self, warn: Callable[[str], None]) -> dict[str, Node]:
        """The nodes that are alive and may work, by id; a new one is looked at first.

        Raises :class:`UserError` at the first call, if a node cannot work with the others.
        """
        first = not self._facts
        alive = {
            each["NodeID"]: each for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")
        }
        new = alive.keys() - self._facts.keys() - self._refused
        own = worker.facts(self.root, self.nonce) if new else {}
        for node_id, found in self._preflight(sorted(new)).items():
            late = "" if first else self.without_server(self.hosts | {found["host"]})
            fault = found["fault"] or worker.different(own, found) or late
            if fault:
                message = (
                    f"node {found['host']} {fault}" if found["fault"] else f"node {found['host']}: {fault}"
                )
                if first:
                    raise UserError(message)
                self._refused.add(node_id)
                warn(f"{message}; it is left out")
            else:
                self._facts[node_id] = found
        return {
            node_id: _node(node_id, self._facts[node_id]["host"], alive[node_id]["Resources"])
            for node_id in alive.keys() & self._facts.keys()
        }

    @property
    def hosts(self) -> set[str]:
        """The names of the machines, on which there may be several nodes."""
        return {found["host"] for found in self._facts.values()}

    @staticmethod
    def without_server(hosts: set[str]) -> str:
        """What is wrong with so many machines and this store of MLflow; "" if nothing."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if len(hosts) < 2 or uri.startswith(SERVERS):
            return ""
        return (
            f"MLFLOW_TRACKING_URI: {len(hosts)} machines cannot share an SQLite file; start mlflow server on "
            "one of them and set it to http://HOST:5000"
        )

    def submit(self, job: worker.Job, node: Node, needs: Needs) -> Ref:
        """Start a stage on ``node``; the reference is ready when it has ended, or its node has died."""
        return _on(node.id, worker.run_stage, job.name, needs).remote(job)

    def wait(self, jobs: Iterable[Ref], seconds: float) -> list[Ref]:
        """Those that have ended, after at most a time."""
        pending = list(jobs)
        return ray.wait(pending, num_returns=len(pending), timeout=seconds)[0] if pending else []

    def outcome(self, job: Ref) -> worker.Outcome:
        """How a job ended; "interrupted" if its node, or Ray's process on it, did not survive it."""
        try:
            found: worker.Outcome = ray.get(job)
            return found
        except ray.exceptions.RayTaskError as error:
            return worker.Outcome("failed", f"fault of the fleet: {str(error).strip().splitlines()[-1]}")
        except ray.exceptions.RayError as error:
            return worker.Outcome("interrupted", str(error).strip().splitlines()[0])

    def abandon(self, job: Ref) -> None:
        """Expect no more of a job whose node does not answer: Ray itself would wait for minutes."""
        ray.cancel(job, force=True)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Ray prints the log of a node that died: to a file beside the stages' logs."""
        name = worker.folder_of(self.root) / "ray.log"
        with open(name, "a", encoding="utf-8") as log, redirect_stdout(log):
            yield

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends."""
        with self.quiet():
            ray.shutdown()

    def _preflight(self, node_ids: list[str]) -> dict[str, dict[str, Any]]:
        jobs = {
            _on(node_id, worker.facts, "preflight", Needs(0, 0)).remote(self.root, self.nonce): node_id
            for node_id in node_ids
        }
        found: dict[str, dict[str, Any]] = {}
        ended = self.wait(jobs, PREFLIGHT_S)
        for job, node_id in jobs.items():
            try:
                if job not in ended:
                    raise TimeoutError(f"did not answer within {PREFLIGHT_S:g} s")
                found[node_id] = ray.get(job)
            except Exception as error:  # whatever is wrong there: another Python, another dynat
                reason = str(error).strip().splitlines()[-1]
                found[node_id] = {"host": node_id[:8], "fault": f"cannot run this code ({reason})"}
        return found


def _on(node_id: str, function: Any, name: str, needs: Needs) -> Any:
    """``function`` as a task of one node, which Ray does not repeat by itself."""
    task = ray.remote(function)
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return task.options(
        name=name, num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=0, scheduling_strategy=here
    )


def _node(node_id: str, host: str, resources: dict[str, float]) -> Node:
    kind = next((name.removeprefix(KIND) for name in resources if name.startswith(KIND)), "")
    return Node(node_id, host, resources.get("CPU", 0.0), resources.get("GPU", 0.0), kind)
