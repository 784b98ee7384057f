"""Cost beside accuracy says what the records and the verdicts say, and where it does not know."""

from pathlib import Path
from typing import Any

import pytest
import synthetic
from synthetic import COUNTS, put

from dynat import cost
from dynat.errors import UserError


def record(root: Path, stage: str, method: str, seed: int, seconds: float, **changes: Any) -> None:
    hardware = {"processor": "a CPU", "accelerator": "a GPU", "device": "cuda"}
    found = {"seconds": seconds, "processes": 1, "resumed": 0, "hardware": hardware, **changes}
    put(root / f"metrics/runs/{stage}/toy/{method}/{seed}.json", found)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The rows by method: pgd_at of two seeds on two GPUs, dynat of one on a CPU, trades never run."""
    selected = synthetic.params(["pgd_at", "trades"], ["dynat"], seeds=(0, 1))
    monkeypatch.setattr(cost, "load", lambda _: selected)
    for seed, robust in ((0, 60), (1, 61)):
        synthetic.write(tmp_path, "pgd_at", COUNTS, seed=seed, aa={100: robust})
        gib = {"peak_memory_bytes": (3 + seed) * 2**30, "energy_joules": 3.6e6 * (1 + seed)}
        record(tmp_path, "train", "pgd_at", seed, 3600 * (1 + seed), processes=2, **gib)
        record(tmp_path, "attack", "pgd_at", seed, 360)
        record(tmp_path, "autoattack", "pgd_at", seed, 1800, peak_memory_bytes=2**30)
    synthetic.write(tmp_path, "dynat", COUNTS)
    on_cpu = {"processor": "a CPU", "accelerator": "none", "device": "cpu"}
    record(tmp_path, "train", "dynat", 0, 900, resumed=1, hardware=on_cpu)
    cost.write(tmp_path)
    lines = (tmp_path / "metrics/runs/cost.md").read_text().splitlines()
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_hours_memory_and_energy_are_means_over_seeds_and_all_processes(
    written: dict[str, list[str]],
) -> None:
    seeds, training, evaluation, memory, energy, *accuracies, hardware = written["pgd_at"]
    assert (seeds, training, evaluation) == ("2", "3.0000", "0.6000")  # (2 + 4) / 2; 0.1 + 0.5
    assert (memory, energy) == ("4.00", "1.5000")
    assert accuracies == ["97.00", "74.00", "60.50"]
    assert hardware == "1 x a GPU, 2 x a GPU"


def test_a_resumed_run_is_a_lower_bound_and_what_is_not_known_a_dash(written: dict[str, list[str]]) -> None:
    assert written["dynat"] == ["1", "≥ 0.2500", "—", "—", "—", "97.00", "74.00", "—", "1 x a CPU"]
    assert written["trades"] == ["0", *["—"] * 8]


def test_the_page_draws_whoever_was_trained_and_attacked(
    written: dict[str, list[str]], tmp_path: Path
) -> None:
    page = (tmp_path / "metrics/runs/cost.html").read_text()
    drawn = page[page.index("<svg") : page.index("</svg>")]
    assert "pgd_at" in drawn
    assert "dynat" not in drawn  # no AutoAttack
    assert "trades" not in drawn
    assert written["pgd_at"][1] in page


def test_without_any_record_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = synthetic.params(["pgd_at"], [])
    monkeypatch.setattr(cost, "load", lambda _: selected)
    with pytest.raises(UserError, match="metrics/runs: no record of a selected run; dvc repro"):
        cost.write(tmp_path)
