"""Which stage runs next, and where: the longest way to the end first, on a node that has room."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, isinf

from dynat.errors import UserError
from dynat.fleet.needs import Needs


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray knows it."""

    id: str
    name: str
    cpus: float
    gpus: float
    kind: str = ""  # of its GPUs


def longest_paths(
    upstream: dict[str, set[str]], seconds: Mapping[str, float], unfinished: Collection[str]
) -> dict[str, float]:
    """Seconds from the start of each unfinished stage to the end of the last one that waits for it.

    ``upstream`` is in the order of a plan: a stage after all that it depends on.
    """
    after = dict.fromkeys(upstream, 0.0)
    path: dict[str, float] = {}
    for name in reversed(list(upstream)):
        path[name] = after[name] + (seconds[name] if name in unfinished else 0.0)
        for above in upstream[name]:
            after[above] = max(after[above], path[name])
    return path


def fitting(needs: Needs, nodes: Iterable[Node]) -> Needs:
    """``needs`` with no more cores than the largest node has that could take the stage.

    On fewer cores a stage is slower and no other. Raises :class:`UserError` if no node has the GPUs.
    """
    able = [node for node in nodes if node.gpus >= needs.gpus and node.cpus > 0]
    if not able:
        raise UserError(f"{needs.gpus:g} GPUs are needed at once, and no node has as many")
    cpus = min(needs.cpus, max(node.cpus for node in able))
    return replace(needs, cpus=cpus, workers=ceil(needs.workers * cpus / needs.cpus) if needs.workers else 0)


def shared(needs: Needs, nodes: Iterable[Node], share: float) -> Needs:
    """``needs`` with no more workers than fit into a ``share`` in (0,1] of all cores.

    Stages side by side are done sooner than one after another: what each does before its workers start, and
    after, occupies one core. A stage that has a node for itself keeps it.
    """
    if not needs.workers or isinf(needs.cpus):
        return needs
    own = needs.cpus / needs.workers
    workers = max(1, min(needs.workers, int(share * sum(node.cpus for node in nodes) / own)))
    return replace(needs, cpus=workers * own, workers=workers)


@dataclass
class Slots:
    """What the stages under way leave free."""

    nodes: dict[str, Node] = field(default_factory=dict)  # by id
    taken: dict[str, tuple[str, Needs]] = field(default_factory=dict)  # by stage: a node's id, what it has

    def place(self, stage: str, needs: Needs, kind: str | None = None) -> Node | None:
        """Take room for ``stage`` on the fullest node that has it, so that large stages find room, too.

        Only on nodes whose GPUs are of ``kind``, if one is given and GPUs are needed; None if there is none.
        """
        found = []
        for node in self.nodes.values():
            used = [each for place, each in self.taken.values() if place == node.id]
            gpus = node.gpus - sum(each.gpus for each in used) - needs.gpus
            cpus = node.cpus - sum(each.cpus for each in used) - needs.cpus
            if min(gpus, cpus) >= 0 and (not needs.gpus or kind in (None, node.kind)):
                found.append((node.gpus > 0 and not needs.gpus, gpus, cpus, node.id))
        if not found:
            return None
        *_, place = min(found)
        self.taken[stage] = place, needs
        return self.nodes[place]

    def give_back(self, stage: str) -> None:
        """``stage`` is over."""
        self.taken.pop(stage, None)

    def seconds_left(self, paths: Mapping[str, float], work: float) -> float:
        """No less than the longest path, nor than all ``work`` on as many slots as have been in use."""
        return max([*paths.values(), work / max(1, len(self.taken))], default=0.0)
