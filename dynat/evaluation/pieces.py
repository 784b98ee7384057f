"""An evaluation in pieces: each is kept when it is finished, and several processes may share them.

A stopped evaluation goes on after its last finished piece. Under torchrun every process makes its share of
the pieces and reads those of the others from the store, so the verdicts are those of one process.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from torch import nn

from dynat.runtime import distributed

Piece = dict[str, Any]  # tensors, numbers, strings, lists and dicts of them
Result = TypeVar("Result")


class StoppedError(Exception):
    """A signal asked to leave; the piece at hand is lost, the finished ones are kept."""


@dataclass(frozen=True)
class Pieces:
    """Where pieces are kept, who is told of a new one, and whether a signal has asked to leave.

    ``stopped`` must be true in every process once it is in one of them.
    """

    load: Callable[[str], Piece | None]
    save: Callable[[str, Piece], None]
    notify: Callable[[str], None]
    stopped: Callable[[], bool]
    expect: Callable[[int], None] = lambda count: None  # how many pieces there will be
    prefix: str = ""  # of the names, so that two evaluations may share a store

    def within(self, prefix: str) -> Self:
        """The same with other names, those of the evaluation ``prefix``."""
        return replace(self, prefix=f"{prefix} ")

    def get(self, name: str, make: Callable[[], Piece], notify: Callable[[str], None] | None = None) -> Piece:
        """The piece ``name`` from the store, or made and kept now; StoppedError before making one."""
        piece = self.load(self.prefix + name)
        if piece is None:
            self.leave_if_stopped()
            piece = make()
            self.save(self.prefix + name, piece)
            (notify or self.notify)(self.prefix + name)
        return piece

    def share(self, work: Sequence[Callable[[], Result]]) -> list[Result]:
        """Do all of ``work``, which keeps its pieces here; every process gets all results, in order.

        Raises :class:`StoppedError` if one of the processes has been asked to leave.
        """
        results = []
        with suppress(StoppedError):  # told to all, who would wait for this one
            results = [do() for do in work[distributed.rank() :: distributed.size()]]
        if distributed.anyone(self.stopped(), meanwhile=self.stopped):
            raise StoppedError
        if distributed.size() == 1:
            return results
        results.clear()
        return [do() for do in work]

    def leave_if_stopped(self, *_: object) -> None:
        """Raise :class:`StoppedError` if a signal has asked to leave."""
        if self.stopped():
            raise StoppedError

    def watch(self, network: nn.Module) -> None:
        """Look for a stop before each forward: a piece may take an hour, a forward does not."""
        network.register_forward_pre_hook(self.leave_if_stopped)
