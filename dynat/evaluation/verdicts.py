"""Per-sample verdicts and the accuracies counted from them: no torch, so an audit can recount cheaply."""

from math import sqrt
from typing import TypedDict

Z95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal


class Accuracy(TypedDict):
    """A share of samples in percent with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    robust: int
    n: int


def encode(robust: list[bool]) -> str:
    """Verdicts as hexadecimal, eight samples to a byte, the first sample the highest bit; zero-padded."""
    padded = robust + [False] * (-len(robust) % 8)
    value = int("".join("01"[flag] for flag in padded) or "0", 2)
    return f"{value:0{len(padded) // 4}x}" if padded else ""


def decode(text: str, n: int) -> list[bool]:
    """The ``n`` verdicts of :func:`encode`; ``ValueError`` if the text cannot hold just as many."""
    if len(text) != -(-n // 8) * 2:
        raise ValueError(f"{len(text)} hexadecimal digits cannot hold the verdicts of {n} samples")
    bits = f"{int(text, 16):0{len(text) * 4}b}" if text else ""
    if "1" in bits[n:]:
        raise ValueError(f"verdicts beyond the {n} samples")
    return [bit == "1" for bit in bits[:n]]


def accuracy(robust: list[bool]) -> Accuracy:
    """Count ``robust``; percentages are rounded to four decimals. Raises ``ValueError`` on no samples."""
    if not robust:
        raise ValueError("no samples to count")
    count, n = sum(robust), len(robust)
    low, high = wilson(count, n)
    return {
        "accuracy": round(100 * count / n, 4),
        "low": round(100 * low, 4),
        "high": round(100 * high, 4),
        "robust": count,
        "n": n,
    }


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, in [0,1] (Wilson 1927)."""
    share, z2 = count / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
