"""One of several processes that train together for test_distributed: torchrun ... two_processes.py FOLDER."""

import sys
from pathlib import Path

import torch
from helpers import Tiny, random_images
from step_cases import CASES, draw
from torch import Tensor, nn

from dynat.methods.batches import Batch
from dynat.methods.step import Engine
from dynat.runtime import distributed

COUNT = 7  # samples: uneven slices


def networks(normalised: bool) -> tuple[Tiny, Tiny]:
    """Target and guide, with or without batch norm."""
    pair = Tiny(0), Tiny(1, width=5)
    for network in pair:
        network(random_images(50))
        if not normalised:
            network.bn1 = network.bn2 = network.sub_block1 = nn.Identity()
    return pair


def train(name: str, normalised: bool) -> dict[str, Tensor]:
    """What two steps leave in target and guide, and their losses."""
    choice, _, rates = CASES[name]
    engine = Engine(choice, *networks(normalised))
    state: dict[str, Tensor] = {}
    for seed, epoch in enumerate(rates, start=20):
        engine.set_epoch(epoch)
        outcome = engine.step(sliced(draw(choice, seed, COUNT)))
        state |= {f"{key}{seed}": value for key, value in outcome._asdict().items()}
    for network in ("target", "guide"):
        state |= {f"{network}.{key}": v for key, v in getattr(engine, network).state_dict().items()}
    return state


def sliced(batch: Batch) -> Batch:
    part = distributed.part(len(batch.truth))
    jitter = None if batch.jitter is None else batch.jitter[:, part]
    return Batch(batch.images[part], batch.truth[part], batch.start[part], jitter)


def everything() -> dict[str, dict[str, Tensor]]:
    return {f"{name} {bn}": train(name, bn) for name in CASES for bn in (False, True)}


if __name__ == "__main__":
    distributed.join(torch.device("cpu"))
    states = everything()
    assert distributed.from_first(distributed.rank()) == 0
    assert [distributed.anyone(distributed.rank() == 1), distributed.anyone(False)] == [True, False]
    torch.save(states, Path(sys.argv[1], f"{distributed.rank()}.pt"))
    distributed.leave()
