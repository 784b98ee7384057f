"""The batches of a training: augmentation and noise as asked for, drawn from (seed, epoch) alone."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from dynat.config.recipe import Recipe
from dynat.config.train import Train
from dynat.data.splits import Splits
from dynat.methods import batches as module
from dynat.methods.batches import Batch, batches, generator

CPU, COUNT = torch.device("cpu"), 300


def data() -> Splits:
    """Images 5x5 that no shift, flip or rotation turns into another, labelled by their place."""
    images = torch.randint(1, 256, (COUNT, 1, 5, 5), dtype=torch.uint8, generator=stream(0))
    labels = torch.arange(COUNT)
    return Splits(images, labels, images[:0], labels[:0], images[:1], labels[:1], ("",) * COUNT)


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipe(inner: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    schedule = {"epochs": 3, "lr": 0.1, "weight_decay": 0.0}
    attack = {"loss": "ce", "start": "uniform", "steps": 2} | (inner or {})
    return Recipe(inner=attack, outer={}, schedule=schedule, **changes)


def whole(choice: Recipe, train: dict[str, Any] | None = None, seed: int = 0, epoch: int = 0) -> Batch:
    """An epoch in one."""
    asked = Train(**{"batch": 128, "pad": 0, "flip": False} | (train or {}))
    parts = list(batches(data(), choice, asked, seed, epoch))
    jitters = [part.jitter for part in parts if part.jitter is not None]
    jitter = torch.cat(jitters, 1) if jitters else None
    return Batch(*(torch.cat([part[place] for part in parts]) for place in range(3)), jitter)


def test_without_augmentation_every_image_comes_once_with_its_label_in_the_order_of_its_stream() -> None:
    images, truth, _, jitter = whole(recipe(), seed=3, epoch=1)
    assert jitter is None
    assert torch.equal(images, data().train_images[truth].float() / 255)
    digest = hashlib.sha256(b"(3, 1, 'batches')").digest()[:8]
    own = stream(int.from_bytes(digest, "big") // 2)
    assert torch.equal(truth, torch.randperm(COUNT, generator=own))
    digest = hashlib.sha256(b"(3, 1, 'noise')").digest()[:8]
    drawn = torch.rand(128, 1, 5, 5, generator=stream(int.from_bytes(digest, "big") // 2))
    assert torch.equal(next(batches(data(), recipe(), Train(pad=0), 3, 1)).start, drawn)


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_crops_are_all_those_of_the_padded_image_alike_often(padding: str) -> None:
    images, truth, *_ = whole(recipe(padding=padding), {"pad": 1})
    mode = "constant" if padding == "zero" else "reflect"
    padded = torch.nn.functional.pad(data().train_images[truth].float() / 255, (1, 1, 1, 1), mode)
    crops = torch.stack([padded[..., i : i + 5, j : j + 5] for i in range(3) for j in range(3)])
    equal = (crops == images).flatten(2).all(2)
    assert (equal.sum(0) == 1).all()
    assert equal.sum(1).min() > COUNT / 9 / 2  # nine crops, each some 33 times


def test_half_of_the_images_are_mirrored_if_asked_for_and_none_else() -> None:
    images, truth, *_ = whole(recipe(), {"flip": True})
    natural = data().train_images[truth].float() / 255
    mirrored = (images == natural.flip(3)).flatten(1).all(1)
    assert (mirrored | (images == natural).flatten(1).all(1)).all()
    assert 120 < mirrored.sum() < 180


def test_angles_are_uniform_within_the_rotation_and_none_where_none_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor | None] = []
    augment = module.augment

    def watched(*drawn: Any) -> Tensor:
        seen.append(drawn[5])
        return augment(*drawn)

    monkeypatch.setattr(module, "augment", watched)
    whole(recipe())
    assert seen == [None] * 3
    seen.clear()
    whole(recipe(rotation=15.0))
    angles = torch.cat([each for each in seen if each is not None])
    assert -15 <= angles.min() < -14
    assert 14 < angles.max() <= 15
    assert abs(angles.mean()) < 1.5
    assert abs(angles.std() - 15 / 3**0.5) < 1


def test_the_start_is_uniform_or_normal_as_the_recipe_asks() -> None:
    uniform, normal = whole(recipe()).start, whole(recipe({"start": "gaussian"})).start
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05


def test_noise_at_every_step_is_standard_normal_and_new_each_time_where_the_stop_has_noise() -> None:
    jitter = whole(recipe({"stop": {"noise": 0.5}})).jitter
    assert jitter is not None
    assert jitter.shape == (2, COUNT, 1, 5, 5)
    assert abs(jitter.mean()) < 0.05
    assert abs(jitter.std() - 1) < 0.05
    assert not torch.equal(jitter[0], jitter[1])
    assert whole(recipe({"stop": {"noise": 0.0}})).jitter is None


FULL = recipe({"stop": {"noise": 0.5}}, rotation=15.0)
AUGMENTED = {"pad": 1, "flip": True}


def test_every_draw_is_of_seed_and_epoch_and_of_nothing_else() -> None:
    torch.manual_seed(1)
    found = whole(FULL, AUGMENTED)
    torch.manual_seed(2)
    for mine, again in zip(found, whole(FULL, AUGMENTED), strict=True):
        assert torch.equal(mine, again)
    for seed, epoch in ((1, 0), (0, 1)):
        for mine, other in zip(found, whole(FULL, AUGMENTED, seed, epoch), strict=True):
            assert not torch.equal(mine, other)


def test_the_slices_of_several_processes_are_together_the_batch_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Train(batch=128, **AUGMENTED)
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts: list[list[Batch]] = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(batches(data(), FULL, asked, 0, 0)))
    monkeypatch.delenv("WORLD_SIZE")
    for number, one in enumerate(batches(data(), FULL, asked, 0, 0)):
        for field, value in one._asdict().items():
            slices = [getattr(part[number], field) for part in parts]
            assert torch.equal(torch.cat(slices, dim=int(field == "jitter")), value), field


def test_a_stream_is_that_of_its_key_alone() -> None:
    keys = [(1, 2, "x"), (2, 1, "x"), (1, 2, "y"), (12, "x")]
    drawn = [torch.rand(4, generator=generator(CPU, *key)).tolist() for key in keys]
    assert len({tuple(each) for each in drawn}) == len(keys)
    assert torch.rand(4, generator=generator(CPU, *keys[0])).tolist() == drawn[0]
