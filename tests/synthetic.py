"""Synthetic results in the stages' layout, and readers of tables, written without the code under test."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from dynat.config.params import Params, parse
from dynat.paper.tabulation import tabulate, text_files

ATTACKS = ("clean", "fgsm", "pgd10", "pgd20", "pgd50", "pgd100", "cw", "apgd-ce")
COUNTS = dict(zip(ATTACKS, (97, 85, 76, 74, 73, 72, 71, 70), strict=True))


def params(
    baselines: list[str],
    variants: list[str],
    seeds: tuple[int, ...] = (0,),
    settings: tuple[str, ...] = ("toy",),
) -> Params:
    """Params that select the methods; the recipes are the least that validates."""
    plain: dict[str, Any] = {
        "inner": {"loss": "ce", "start": "uniform"},
        "outer": {},
        "schedule": {"epochs": 2, "lr": 0.1, "weight_decay": 0.0},
    }
    study = {
        "data": {"source": "digits", "classes": 10, "test": 100},
        "target": {"name": "cnn"},
        "guide": {"name": "cnn"},
        "attack": {"epsilon": "8/255", "step": "2/255", "pgd": [10, 20, 50, 100]},
        "autoattack": {"epsilon": "8/255", "n": [10]},
    }
    return parse(
        {
            "settings": list(settings),
            "baselines": baselines,
            "variants": variants,
            "seeds": list(seeds),
            "study": dict.fromkeys(settings, study),
            "recipes": dict.fromkeys(baselines, plain) | dict.fromkeys(variants, plain | {"labels": "guide"}),
        }
    )


def hexadecimal(flags: list[bool]) -> str:
    """Eight verdicts to a byte, the first one the highest bit."""
    padded = flags + [False] * (-len(flags) % 8)
    chunks = [padded[first : first + 8] for first in range(0, len(padded), 8)]
    return bytes(sum(flag << (7 - i) for i, flag in enumerate(chunk)) for chunk in chunks).hex()


def binary(text: str, n: int) -> list[bool]:
    """The inverse of :func:`hexadecimal`."""
    return [bool(byte >> (7 - i) & 1) for byte in bytes.fromhex(text) for i in range(8)][:n]


def stated(robust: int, n: int) -> dict[str, float]:
    """The metric of ``robust`` among ``n``, its interval the roots of (p - robust/n)² = z² p(1-p)/n."""
    z, share = 1.959963984540054, robust / n
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    root = max(0.0, b * b - 4 * a * c) ** 0.5
    low, high = max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))
    percent = {"accuracy": 100 * share, "low": 100 * low, "high": 100 * high}
    return {name: round(value, 4) for name, value in percent.items()} | {"robust": robust, "n": n}


def write(
    root: Path,
    method: str,
    counts: dict[str, int],
    *,
    seed: int = 0,
    setting: str = "toy",
    n: int = 100,
    last: int = 0,
    train: int | None = None,
    aa: dict[int, int] | None = None,
    attack: dict[str, Any] | None = None,
    autoattack: dict[str, Any] | None = None,
) -> None:
    """Write attack metrics (``counts`` robust of n; in the last epoch ``last`` fewer) and AutoAttack's.

    ``train`` of n training images are robust to PGD-20 in the last epoch; they are not attacked without it.

    ``aa`` maps a sample size to the robust ones among them.
    ``attack`` and ``autoattack`` replace entries of the headers.
    """
    header = {"epsilon": 8 / 255, "attack_seed": 0, "model_sha256": f"{method}-{seed}", "best_epoch": 1}
    metrics: dict[str, Any] = {**header, "last_epoch": 2, **(attack or {})}
    verdicts: dict[str, Any] = {}
    for checkpoint, less in (("best", 0), ("last", last)):
        metrics[checkpoint] = {name: stated(count - less, n) for name, count in counts.items()}
        verdicts[checkpoint] = {
            name: {"n": n, "robust": hexadecimal([i < count - less for i in range(n)])}
            for name, count in counts.items()
        }
    if train is not None:
        metrics["last-train"] = {"clean": stated(n, n), "pgd20": stated(train, n)}
        verdicts["last-train"] = {
            name: {"n": n, "robust": hexadecimal([i < count for i in range(n)])}
            for name, count in (("clean", n), ("pgd20", train))
        }
    folder = root / f"metrics/attack/{setting}/{method}"
    put(folder / f"{seed}.json", metrics)
    put(folder / f"{seed}.verdicts.json", verdicts)
    if not aa:
        return
    flags: list[bool] = []
    for size, robust in sorted(aa.items()):
        missing = robust - sum(flags)
        flags += [i < missing for i in range(size - len(flags))]
    union = {
        **header,
        "precision": "fp32",
        "warnings": [],
        **(autoattack or {}),
        "best": {"square": stated(sum(flags), len(flags))},
        "aa": {f"n{size}": stated(robust, size) for size, robust in aa.items()},
    }
    folder = root / f"metrics/autoattack/{setting}/{method}"
    put(folder / f"{seed}.json", union)
    square = {"n": len(flags), "robust": hexadecimal(flags)}
    put(folder / f"{seed}.verdicts.json", {"best": {"square": square}})


def put(path: Path, value: object) -> None:
    """Write JSON, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def history(root: Path, method: str, seed: int = 0, setting: str = "toy") -> None:
    """A history of three epochs."""
    path = root / f"models/{setting}/{method}/{seed}/history.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "epoch,lr,target_loss,train_clean,test_clean,validation_clean,validation_robust"
    rows = [f"{e},0.1,{2 - e / 2},{50 + 9 * e},{48 + 9 * e},47,{30 + e}" for e in range(3)]
    path.write_text("\n".join([head, *rows, ""]), encoding="utf-8")


def files(selection: Params, root: Path) -> dict[str, str]:
    """The text files of a tabulation."""
    return text_files(tabulate(selection, root))


def rows(markdown: str, table: int = 0) -> dict[str, dict[str, str]]:
    """A table of a Markdown file: label -> heading (without n) -> text."""
    blocks = [b for b in markdown.split("\n\n") if b.startswith("|")]
    lines = [[text.strip() for text in line.strip("|").split("|")] for line in blocks[table].splitlines()]
    head = [text.partition(" (")[0] for text in lines[0]]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines[2:]}


def records(text: str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(text)))


def raised(markdown: str, note: str) -> str:
    """The mark of the footnote that contains ``note``."""
    return next(
        line.split(" ")[0] for line in markdown.splitlines() if note in line and not line.startswith("|")
    )


def recount(root: Path, source: dict[str, object]) -> tuple[int, float]:
    """Seed and accuracy of a source, counted from the verdict file alone."""
    verdicts = json.loads((root / str(source["verdicts"])).read_text())
    evidence = verdicts[source["checkpoint"]][source["attack"]]
    flags = binary(evidence["robust"], evidence["n"])[: int(str(source["n"]))]
    return int(str(source["seed"])), 100 * sum(flags) / len(flags)
