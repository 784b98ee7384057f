"""Losses in plain Python, and whether code has their values and gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

Array = np.ndarray
ROWS, CLASSES = 4, 5


def softmax(row: Array) -> list[float]:
    exponentials = [math.exp(z - max(row)) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def plain_ce(row: Array, label: int, smoothing: float = 0.0) -> float:
    total = 0.0
    for k, p in enumerate(softmax(row)):
        wanted = (1 - smoothing) * (k == label) + smoothing / len(row)
        total -= wanted * math.log(p)
    return total


def plain_kl(natural: Array, adversarial: Array) -> float:
    return sum(
        p * (math.log(p) - math.log(q)) for p, q in zip(softmax(natural), softmax(adversarial), strict=True)
    )


def draw_logits(seed: int, number: int) -> list[Array]:
    generator = np.random.default_rng(seed)
    return [2 * generator.standard_normal((ROWS, CLASSES)) for _ in range(number)]


def draw_labels(seed: int) -> Array:
    return np.random.default_rng(100 + seed).integers(CLASSES, size=ROWS)


def slopes(function: Callable[..., float], inputs: list[Array], h: float = 1e-5) -> list[Array]:
    """Gradient of ``function`` by central differences."""
    gradients = []
    for array in inputs:
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + h
            above = function(*inputs)
            array[place] = kept - h
            below = function(*inputs)
            array[place] = kept
            gradient[place] = (above - below) / (2 * h)
        gradients.append(gradient)
    return gradients


def assert_same(code: Callable[..., Tensor], plain: Callable[..., float], inputs: list[Array]) -> None:
    """``code`` has the value and the gradient of ``plain``; an input it does not reach has gradient 0."""
    tensors = [torch.tensor(array, requires_grad=True) for array in inputs]
    value = code(*tensors)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(plain(*inputs), rel=1e-12, abs=1e-13)
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    for tensor, gradient, expected in zip(tensors, found, slopes(plain, inputs), strict=True):
        gradient = torch.zeros_like(tensor) if gradient is None else gradient
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-6, atol=1e-8)
