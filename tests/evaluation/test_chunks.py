"""Chunks: kept by name, never made twice, left within a forward."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynat.evaluation.chunks import Chunk, Chunks, StoppedError


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
