"""What every stage shares: memory that is not there is a line that names the batch."""

import sys
from typing import NoReturn

import pytest
import torch

from dynat.errors import UserError
from dynat.methods import setup
from dynat.runtime import machine
from dynat.runtime.stage import memory_for
from stages import train

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.1 GiB"


def full(*_: object) -> NoReturn:
    raise torch.OutOfMemoryError(FULL)


def test_memory_that_is_not_there_is_one_line_and_any_other_error_itself() -> None:
    for take, asked in ((full, "20.00 MiB"), (lambda: torch.empty(2**50), "4503599627370496 bytes")):
        with pytest.raises(UserError) as caught, memory_for("some.batch"):
            take()
        text = (
            f"some.batch: out of memory, tried to allocate {asked}; choose a smaller one, or another device"
        )
        assert str(caught.value) == text
    for text in (
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        with (
            pytest.raises(UserError, match=r"^some\.batch: out of memory, no more memory"),
            memory_for("some.batch"),
        ):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="size of tensor"), memory_for("some.batch"):
        torch.ones(2) + torch.ones(3)


def test_a_training_that_gets_no_memory_names_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "digits", "pgd_at", "0"])
    monkeypatch.setattr(machine, "pin", lambda _: None)
    monkeypatch.setattr(setup, "set_up", full)
    with pytest.raises(UserError, match=r"^study\.digits\.train\.batch: out of memory, tried to allocate 20"):
        train.stage()
