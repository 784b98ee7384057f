"""The loop that gives stages to nodes, records what they finish, and tries again what a fault stopped."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dynat.config.params import Params, recipe_of
from dynat.errors import UserError
from dynat.fleet.cluster import Cluster, Ref
from dynat.fleet.display import Counts, Display, Running, duration
from dynat.fleet.dvc_stages import Pipeline
from dynat.fleet.needs import Command, Durations, Needs, needs
from dynat.fleet.schedule import Node, Slots, fitting, longest_paths, shared
from dynat.fleet.worker import Job, Outcome, environment_of_driver, finished, folder_of, result_of

POLL_S = 0.5


@dataclass
class Attempt:
    """A stage under way."""

    job: Job
    node: Node
    running: Running


@dataclass
class Tries:
    """The attempts at a stage so far."""

    count: int = 0
    fruitless: int = 0  # in a row, without any progress
    epoch: int = -1  # the last one that any of them finished
    kind: str | None = None  # of the GPU of the first: another one could not go on from its state


@dataclass
class Driver:
    """One run of a fleet; the only process that writes ``dvc.lock`` meanwhile."""

    pipeline: Pipeline
    params: Params
    cluster: Cluster
    display: Display
    retries: int
    gpu_kind: str | None
    mixed: bool
    stopping: Callable[[], bool]
    slots: Slots = field(default_factory=Slots)
    failed: dict[str, str] = field(default_factory=dict)  # why, and where the log is

    def __post_init__(self) -> None:
        stages = self.pipeline.stages
        self.root = self.pipeline.root
        self.commands = {name: Command.parse(each.command) for name, each in stages.items()}
        self.durations = Durations(self.commands.values())
        self.waiting, self.ready = list(stages), list[str]()
        self.done, self.skipped = set[str](), set[str]()
        self.tries = {name: Tries() for name in stages}
        self.attempts: dict[Ref, Attempt] = {}
        self.stop = folder_of(self.root) / f"stop-{self.cluster.nonce}"
        self.seen: dict[str, Node] = {}  # every node that there has been
        self.idle = False

    # ------------------------------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Do everything that can be done; whether nothing was asked to stop."""
        with self.display, self.cluster.quiet():
            while self.waiting or self.ready or self.attempts:
                if self.stopping() and not self.stop.exists():
                    self.stop.touch()
                    self.display.line(f"stopping: {len(self.attempts)} stages save what they have")
                if self.stop.exists():
                    self.waiting, self.ready = [], []
                self.find_nodes()
                self._begin()
                self._submit()
                self._collect()
                self.display.update(self.counts())
        self.pipeline.sort_lock()
        stopped = self.stop.exists()
        self.stop.unlink(missing_ok=True)
        return not stopped

    def find_nodes(self) -> None:
        """Learn which nodes there are; give up on what ran on those that are gone.

        Raises :class:`UserError` at first if a node cannot work with the others, or GPUs differ in kind.
        """
        nodes = self.cluster.refresh(self.display.line)
        kinds = {node.kind for node in nodes.values() if node.gpus}
        if self.gpu_kind:
            if not self.seen and self.gpu_kind not in kinds:
                raise UserError(
                    f"--gpu-kind {self.gpu_kind}: there are only {', '.join(sorted(kinds)) or 'none'}"
                )
            kinds = {self.gpu_kind}
        elif len(kinds) > 1 and not self.mixed and not self.seen:
            raise UserError(
                f"the nodes have different GPUs ({', '.join(sorted(kinds))}), and a training goes on only on "
                "its own; choose one with --gpu-kind, or allow all with --mixed"
            )
        elif self.seen and not self.mixed:  # a node that joined late
            before = {node.kind for node in self.seen.values() if node.gpus}
            kinds = before or set(sorted(kinds)[:1])
        self.slots.nodes = {
            node_id: node if node.kind in kinds or not node.gpus else Node(node_id, node.name, node.cpus, 0)
            for node_id, node in nodes.items()
        }
        self.seen |= self.slots.nodes
        for job, attempt in list(self.attempts.items()):
            if attempt.node.id not in nodes:
                self.cluster.abandon(job)
                self._ended(job, Outcome("interrupted", f"node {attempt.node.name} does not answer"))

    def _begin(self) -> None:
        """See what DVC would do with each stage whose turn has come; prepare those that must run."""
        cached = []
        for name in list(self.waiting):
            if self.pipeline.upstream[name] & (self.failed.keys() | self.skipped):
                self.waiting.remove(name)
                self.skipped.add(name)
            elif self.pipeline.upstream[name] <= self.done:
                self.waiting.remove(name)
                try:
                    state = self.pipeline.state(name)
                except UserError as error:
                    self._fail(name, str(error))
                    continue
                if state == "to run":
                    self.ready.append(name)
                elif state == "cached":
                    cached.append(name)
                else:
                    self.done.add(name)
        self._record(cached, "taken from the run cache")

    def _submit(self) -> None:
        """Start the stages with the longest way to the end, as long as there is room."""
        paths, nodes, seconds = self._paths(), self.slots.nodes.values(), self._seconds_on_cpu()
        total = sum(seconds.values())
        for name in sorted(self.ready, key=lambda name: -paths[name]):
            tries = self.tries[name]
            try:
                share = seconds[name] / total if name in seconds else 1.0
                required = fitting(shared(self.needs(name), nodes, share), nodes)
            except UserError:
                try:
                    fitting(self.needs(name), self.seen.values())  # a node that has gone may come again
                except UserError as error:
                    self._fail(name, str(error))
                    self.ready.remove(name)
                continue
            node = self.slots.place(name, required, tries.kind)
            if node is None:
                continue
            self.ready.remove(name)
            if required.gpus:
                tries.kind = node.kind
            try:
                self._start(name, node, required)
            except UserError as error:
                self.slots.give_back(name)
                self._fail(name, str(error))

    def _start(self, name: str, node: Node, required: Needs) -> None:
        tries, stage = self.tries[name], self.pipeline.stages[name]
        tries.count += 1
        done = finished(stage, stage.dependencies(), result_of(self.root, name))
        planned = self.pipeline.begin(name, done or tries.count > 1)
        environment = environment_of_driver()
        environment |= {"DYNAT_WORKERS": str(required.workers)} if required.workers else {}
        job = Job(self.root, name, planned, environment, required.gpus, tries.count, self.stop)
        command, size = self.commands[name], job.log.stat().st_size if job.log.exists() else 0
        running = Running(
            f"{node.name}{' GPU' if required.gpus else ''}",
            time.time(),
            job.log,
            size,
            self.durations.expected(command),
            self._epochs(command),
        )
        self.attempts[self.cluster.submit(job, node, required)] = Attempt(job, node, running)
        again = f" (attempt {tries.count})" if tries.count > 1 else ""
        self.display.line(f"{name}: started on {running.where}{again}")

    def _collect(self) -> None:
        """Deal with what has ended."""
        idle = bool(self.ready and not self.attempts)
        if idle and not self.idle:
            self.display.line(f"{len(self.ready)} stages wait for a node that has room for them")
        if idle:
            time.sleep(POLL_S)
        self.idle = idle
        finished_now = []
        for job in self.cluster.wait(self.attempts, POLL_S):
            name, outcome = self._ended(job, self.cluster.outcome(job))
            if outcome.ended == "done":
                finished_now.append(name)
        self._record(finished_now, "")

    def _ended(self, ref: Ref, outcome: Outcome) -> tuple[str, Outcome]:
        attempt = self.attempts.pop(ref)
        name, tries = attempt.job.name, self.tries[attempt.job.name]
        self.slots.give_back(name)
        if outcome.ended == "done":
            took = outcome.seconds or time.time() - attempt.running.started
            if outcome.seconds:
                self.durations.finished(self.commands[name], took)
            where = f" on {outcome.node}" + (f", GPU {outcome.gpu}" if outcome.gpu else "")
            note = f" ({outcome.why})" if outcome.why else ""
            self.display.line(f"{name}: done in {duration(took)}{where}{note}; {self.counts(1)}")
            return name, outcome
        self.pipeline.release(name)
        if outcome.ended == "stopped" or self.stop.exists():
            return name, outcome
        epoch = attempt.running.epoch()
        further = epoch > tries.epoch or attempt.running.finished_a_chunk()
        tries.epoch = max(epoch, tries.epoch)
        tries.fruitless = 0 if further else tries.fruitless + 1
        again = (outcome.ended == "interrupted" and tries.fruitless <= self.retries) or (
            outcome.ended == "failed" and further
        )
        if again:
            self.display.line(f"{name}: {outcome.why}; tried again")
            self.ready.append(name)
        else:
            self._fail(name, f"{outcome.why} (log: {os.path.relpath(attempt.job.log, self.root)})")
        return name, outcome

    def _record(self, names: list[str], note: str) -> None:
        if not names:
            return
        refused = self.pipeline.record(names)
        for name, why in refused.items():
            self._fail(name, why)
        self.done.update(set(names) - refused.keys())
        for name in names if note else ():
            self.display.line(f"{name}: {note}")

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        self.display.line(f"{name}: FAILED: {why}")

    # ------------------------------------------------------------------------------------- what is known

    def needs(self, name: str) -> Needs:
        """What a stage needs, on the nodes that there are."""
        gpus_here = any(node.gpus for node in self.seen.values())  # also if they have gone: others may come
        return needs(self.commands[name], self.params, self.pipeline.stages[name].meta, gpus_here)

    def _seconds_on_cpu(self) -> dict[str, float]:
        """What each stage without a GPU that is ready or under way is expected to take."""
        names = [*self.ready, *(attempt.job.name for attempt in self.attempts.values())]
        on_cpu = [name for name in names if not self.needs(name).gpus]
        return {name: self.durations.expected(self.commands[name]) for name in on_cpu}

    def _epochs(self, command: Command) -> int | None:
        if command.kind != "train" or len(command.arguments) != 3:
            return None
        setting, method, _ = command.arguments
        known = setting in self.params.study and recipe_of(method) in self.params.recipes
        return self.params.recipe(setting, method).schedule.epochs if known else None

    def _paths(self) -> dict[str, float]:
        unfinished = {*self.waiting, *self.ready, *(each.job.name for each in self.attempts.values())}
        seconds = {name: self.durations.expected(command) for name, command in self.commands.items()}
        return longest_paths(self.pipeline.upstream, seconds, unfinished)

    def counts(self, more: int = 0) -> Counts:
        """How many stages are where; ``more`` are done and not recorded yet."""
        running = {each.job.name: each.running for each in self.attempts.values()}
        unfinished = [*self.waiting, *self.ready, *running]
        work = sum(self.durations.expected(self.commands[name]) for name in unfinished)
        paths = self._paths()
        left = self.slots.seconds_left({name: paths[name] for name in unfinished}, work)
        return Counts(
            len(self.commands), len(self.done) + more, len(self.failed), len(self.skipped), left, running
        )
