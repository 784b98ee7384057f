"""Chunks: kept by name, never made twice, left within a forward."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynat.evaluation.chunks import Chunk, Chunks, StoppedError
from dynat.runtime import distributed


def making(made: list[int], number: int) -> Callable[[], Chunk]:
    def make() -> Chunk:
        made.append(number)
        return {"number": number}

    return make


def test_a_finished_chunk_is_taken_from_the_store_and_only_a_new_one_is_notified() -> None:
    kept: dict[str, Chunk] = {}
    made: list[int] = []
    notified: list[str] = []
    chunks = Chunks(kept.get, kept.__setitem__, notify=notified.append, prefix="best ")
    for _ in range(2):
        assert [chunks.get(f"{n}", making(made, n)) for n in (3, 5)] == [{"number": 3}, {"number": 5}]
    assert list(kept) == notified == ["best 3", "best 5"]
    assert made == [3, 5]


def test_a_stop_keeps_what_is_finished_and_begins_nothing() -> None:
    kept: dict[str, Chunk] = {}
    made: list[int] = []
    chunks = Chunks(kept.get, kept.__setitem__, stopped=lambda: len(kept) == 2)
    work = [lambda n=n: chunks.get(f"{n}", making(made, n)) for n in range(4)]
    with pytest.raises(StoppedError):
        chunks.share(work)
    assert made == [0, 1]
    assert chunks.get("1", making(made, 9)) == {"number": 1}


def test_by_default_every_chunk_is_made_here() -> None:
    made: list[int] = []
    chunks = Chunks()
    for _ in range(2):
        assert chunks.share([lambda: chunks.get("one", making(made, 1))]) == [{"number": 1}]
    assert made == [1, 1]


def test_a_watched_network_leaves_before_its_next_forward() -> None:
    network, asked = nn.Identity(), [False, False, True]
    Chunks(stopped=lambda: asked.pop(0)).watch(network)
    x = torch.zeros(1)
    network(x), network(x)
    with pytest.raises(StoppedError):
        network(x)


class SecondOfTwo:
    """Process 1 of two, whose other one makes its chunks into ``kept`` before they meet."""

    def __init__(self, kept: dict[str, Chunk], monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept, self.met = kept, list[bool]()
        monkeypatch.setattr(distributed, "size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        monkeypatch.setattr(distributed, "anyone", self.anyone)

    def anyone(self, flag: bool, meanwhile: Callable[[], bool]) -> bool:
        assert meanwhile() == flag  # a signal that comes during the wait is seen
        self.met.append(flag)
        self.kept |= {"0": {"number": 0}, "2": {"number": 2}}
        return flag


def test_each_of_two_processes_makes_its_share_and_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Chunk] = {}
    made: list[int] = []
    both = SecondOfTwo(kept, monkeypatch)
    chunks = Chunks(kept.get, kept.__setitem__, shared=True)
    found = chunks.share([lambda n=n: chunks.get(f"{n}", making(made, n)) for n in range(4)])
    assert found == [{"number": n} for n in range(4)]
    assert made == [1, 3]
    assert both.met == [False]
    made.clear()
    alone = Chunks()  # what is not shared each makes for itself
    alone.share([lambda n=n: alone.get(f"{n}", making(made, n)) for n in range(4)])
    assert made == [0, 1, 2, 3]
    assert both.met == [False]


def test_a_process_that_is_asked_to_leave_tells_the_other_one_before_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: dict[str, Chunk] = {}
    made: list[int] = []
    both = SecondOfTwo(kept, monkeypatch)
    chunks = Chunks(kept.get, kept.__setitem__, stopped=lambda: bool(made), shared=True)
    with pytest.raises(StoppedError):
        chunks.share([lambda n=n: chunks.get(f"{n}", making(made, n)) for n in range(4)])
    assert made == [1]
    assert both.met == [True]
