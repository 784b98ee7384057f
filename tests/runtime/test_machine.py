"""Where a stage computes: the switch of TF32, and what a precision means on a device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dynat.config.params import Machine
from dynat.config.recipe import Precision
from dynat.evaluation.evidence import predict
from dynat.runtime.machine import convolutions, device_of, precision_of


@pytest.fixture(autouse=True)
def as_a_stage() -> Iterator[None]:
    """The switches of the process as a stage sets them, and afterwards as they were."""
    mode, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    device_of(Machine(device="cpu"), "machine")
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_tf32_is_on_inside_alone_also_after_an_error() -> None:
    def inside() -> None:
        with convolutions("tf32"):
            assert torch.backends.cudnn.allow_tf32
            with convolutions("fp32"):
                assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.allow_tf32
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert not torch.backends.cudnn.allow_tf32


def test_a_verdict_is_float32_also_where_images_are_crafted_in_tf32() -> None:
    seen: list[bool] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return x.flatten(1)

    with convolutions("tf32"):
        predict(Watching().eval(), torch.rand(2, 1, 2, 2))
    assert seen == [False]


@pytest.mark.parametrize(
    ("asked", "capability", "found"),
    [
        ("auto", (9, 0), "tf32"),
        ("auto", (7, 5), "fp32"),
        ("tf32", (7, 5), "fp32"),
        ("fp32", (9, 0), "fp32"),
        ("bf16", (7, 5), "bf16"),
        ("auto", None, "fp32"),
        ("tf32", None, "fp32"),
        ("bf16", None, "bf16"),
    ],
)
def test_auto_is_what_the_published_code_ran_in(
    asked: str, capability: tuple[int, int] | None, found: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision_of(asked, torch.device("cpu" if capability is None else "cuda")) == found


def test_no_memory_is_filled_before_it_is_written() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
