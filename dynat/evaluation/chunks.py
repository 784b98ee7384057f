"""An evaluation in chunks, each kept when it is finished, which several processes may share.

A stopped evaluation goes on after its last finished chunk. Under torchrun every process makes its share of
the chunks and reads those of the others from the store, so the verdicts are those of one process.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from dynat.runtime import distributed

Chunk = dict[str, Any]  # tensors, numbers, strings, lists and dicts of them
Result = TypeVar("Result")


class StoppedError(BaseException):  # like KeyboardInterrupt no fault, so that MLflow has the run as killed
    """A signal asked to leave; the chunk at hand is lost, the finished ones are kept."""


@dataclass(frozen=True)
class Chunks:
    """Where chunks are kept, what to call for a new one, and whether a signal has asked to leave.

    By default they are made in this process, kept nowhere and never stopped.
    """

    load: Callable[[str], Chunk | None] = lambda name: None
    save: Callable[[str, Chunk], None] = lambda name, chunk: None
    stopped: Callable[[], bool] = lambda: False  # if shared: true in every process once it is in one of them
    notify: Callable[[str], None] = lambda name: None  # a chunk has been made
    expect: Callable[[int], None] = lambda count: None  # so many more chunks belong to the evaluation
    shared: bool = False  # between processes, all of which load what one of them saved
    prefix: str = ""  # of the names, so that two evaluations may share a store

    def get(self, name: str, make: Callable[[], Chunk], notify: Callable[[str], None] | None = None) -> Chunk:
        """The chunk ``name`` from the store, or made and kept now; StoppedError before making one."""
        chunk = self.load(self.prefix + name)
        if chunk is None:
            self.leave_if_stopped()
            chunk = make()
            self.save(self.prefix + name, chunk)
            (notify or self.notify)(self.prefix + name)
        return chunk

    def share(self, work: Sequence[Callable[[], Result]]) -> list[Result]:
        """Do all of ``work``, which keeps its chunks here; every process gets all results, in order.

        Raises :class:`StoppedError` if one of the processes has been asked to leave.
        """
        if not self.shared or distributed.size() == 1:
            return [do() for do in work]
        with suppress(StoppedError):  # first all must know, who would wait for this one
            for do in work[distributed.rank() :: distributed.size()]:
                do()
        if distributed.anyone(self.stopped(), meanwhile=self.stopped):
            raise StoppedError
        return [do() for do in work]

    def leave_if_stopped(self, *_: object) -> None:
        """Raise :class:`StoppedError` if a signal has asked to leave."""
        if self.stopped():
            raise StoppedError

    def watch(self, network: nn.Module) -> None:
        """Look for a stop before each forward: a chunk may take an hour, a forward does not."""
        network.register_forward_pre_hook(self.leave_if_stopped)
