"""Cost beside accuracy says what the records and the verdicts say, and where it does not know."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import synthetic
from synthetic import COUNTS, put

from dynat import cost
from dynat.errors import UserError

GPU = {"processor": "a CPU", "accelerator": "a GPU", "device": "cuda"}
CPU = {"processor": "a CPU", "accelerator": "none", "device": "cpu"}
GIB, KWH = 2**30, 3.6e6


def record(root: Path, stage: str, method: str, seed: int, seconds: float, **changes: Any) -> None:
    """A record as the stages write it, of weights as :func:`synthetic.write` names them."""
    found = {"seconds": seconds, "processes": 1, "resumed": 0, "hardware": GPU}
    weights = {"model_sha256": f"{method}-{seed}"}
    put(root / f"metrics/runs/{stage}/toy/{method}/{seed}.json", found | weights | changes)


def recorded(root: Path, method: str, seed: int, gib: float = 1, kwh: float = 1, **changes: Any) -> None:
    """Records of all stages: an hour of training, half an hour of evaluation."""
    told = {"peak_memory_bytes": gib * GIB, "energy_joules": kwh * KWH}
    for stage, seconds in (("train", 3600), ("attack", 600), ("autoattack", 1200)):
        record(root, stage, method, seed, seconds, **told | changes)


@pytest.fixture
def select(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Selects pgd_at, trades and dynat with these seeds in the place of params.yaml."""

    def selected(*seeds: int) -> None:
        chosen = synthetic.params(["pgd_at", "trades"], ["dynat"], seeds)
        monkeypatch.setattr(cost, "load", lambda _: chosen)

    return selected


def rows(root: Path) -> dict[str, list[str]]:
    """Write both files; the Markdown's cells by method, without the label, each split at blanks."""
    cost.write(root)
    accuracies = (root / "metrics/runs/cost.md").read_text().partition("undecided claims")[0]
    lines = accuracies.splitlines()
    found = [[text.strip() for text in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0].rstrip("ᵃᵇᶜ"): row[1:] for row in found[2:]}


def sentence(root: Path, words: str) -> str:
    """The line of the Markdown with these words; the page must have it, too."""
    (line,) = [each for each in (root / "metrics/runs/cost.md").read_text().splitlines() if words in each]
    assert words in (root / "metrics/runs/cost.html").read_text()
    return line


def figure(root: Path) -> str:
    page = (root / "metrics/runs/cost.html").read_text()
    return page[page.index("<svg") : page.index("</svg>")]


def test_hours_memory_and_energy_are_means_over_seeds_and_of_all_processes(
    select: Any, tmp_path: Path
) -> None:
    select(0, 1)
    for seed, robust in ((0, 60), (1, 61)):
        synthetic.write(tmp_path, "pgd_at", COUNTS, seed=seed, aa={100: robust})
        told = {"peak_memory_bytes": (3 + seed) * GIB, "energy_joules": KWH * (1 + seed)}
        record(tmp_path, "train", "pgd_at", seed, 3600 * (1 + seed), processes=2, **told)
        record(tmp_path, "attack", "pgd_at", seed, 360, peak_memory_bytes=GIB, energy_joules=KWH / 4)
        record(tmp_path, "autoattack", "pgd_at", seed, 1800, peak_memory_bytes=0, energy_joules=KWH / 8)
    seeds, hours, training, evaluation, memory, energy, *accuracies, hardware = rows(tmp_path)["pgd_at"]
    assert seeds == "2"
    assert (hours, training) == ("1.5000", "3.0000")  # (1 + 2) / 2, on two devices each
    assert (evaluation, energy) == ("0.6000", "1.8750")  # 0.1 + 0.5; 1.5 + 0.25 + 0.125
    assert memory == "4.00"
    assert accuracies == ["97.00 ± 0.00", "74.00 ± 0.00", "60.50 ± 0.71"]
    assert hardware == "2 × a GPU (train); 1 × a GPU (attack, autoattack)"


def test_rows_are_in_the_order_of_the_tables_and_accuracies_have_their_footnotes(
    select: Any, tmp_path: Path
) -> None:
    select(0)
    for method in ("dynat", "trades", "pgd_at"):
        synthetic.write(tmp_path, method, COUNTS, aa={100: 40}, autoattack={"warnings": ["masked?"]})
        recorded(tmp_path, method, 0)
    put(tmp_path / "metrics/sanity/toy/dynat/0.json", {
        "checks": {"one": {"passed": False}}, "n": 1, "model_sha256": "dynat-0"
    })  # fmt: skip
    found = rows(tmp_path)
    assert list(found) == ["pgd_at", "trades", "dynat"]
    text = (tmp_path / "metrics/runs/cost.md").read_text()
    assert synthetic.raised(text, "AutoAttack warned: masked?") in found["dynat"][8]
    assert f"dynat{synthetic.raised(text, 'sanity check failed: one')} " in text
    assert "AutoAttack warned: masked?" in (tmp_path / "metrics/runs/cost.html").read_text()


def test_every_figure_of_a_resumed_run_is_at_least_what_is_known(select: Any, tmp_path: Path) -> None:
    select(0)
    for method in ("pgd_at", "dynat"):
        synthetic.write(tmp_path, method, COUNTS, aa={100: 40})
        recorded(tmp_path, method, 0, resumed=int(method == "dynat"))
    found = rows(tmp_path)
    assert found["pgd_at"][1:6] == ["1.0000", "1.0000", "0.5000", "1.00", "3.0000"]
    assert found["dynat"][1:6] == ["≥ 1.0000", "≥ 1.0000", "≥ 0.5000", "≥ 1.00", "≥ 3.0000"]
    assert re.findall(r">(\w+(?: \(at least\))?)</text>", figure(tmp_path))[-2:] == [
        "pgd_at",
        "dynat (at least)",
    ]
    record(tmp_path, "autoattack", "dynat", 0, 1200, peak_memory_bytes=0, energy_joules=0)
    record(tmp_path, "train", "dynat", 0, 3600, peak_memory_bytes=0, energy_joules=0)
    assert rows(tmp_path)["dynat"][1:4] == ["1.0000", "1.0000", "≥ 0.5000"]  # only the attack was


def test_what_a_record_does_not_tell_is_a_dash_and_a_part_of_it_at_least_that(
    select: Any, tmp_path: Path
) -> None:
    select(0)
    synthetic.write(tmp_path, "pgd_at", COUNTS)
    record(tmp_path, "train", "pgd_at", 0, 1800)  # as records were before memory and energy
    record(tmp_path, "attack", "pgd_at", 0, 360, energy_joules=None)
    synthetic.write(tmp_path, "dynat", COUNTS)
    recorded(tmp_path, "dynat", 0)
    record(tmp_path, "train", "dynat", 0, 3600, hardware=CPU, peak_memory_bytes=2 * GIB, energy_joules=None)
    found = rows(tmp_path)
    pgd_at = ["1", "0.5000", "0.5000", "≥ 0.1000", "—", "—"]
    assert (found["pgd_at"][:6], found["pgd_at"][8]) == (pgd_at, "—")
    assert found["dynat"][:6] == ["1", "1.0000", "1.0000", "0.5000", "2.00", "≥ 2.0000"]
    assert found["trades"] == ["0", *["—"] * 9]


def test_one_line_names_what_has_no_record(select: Any, tmp_path: Path) -> None:
    select(0, 1)
    for seed in (0, 1):
        synthetic.write(tmp_path, "pgd_at", COUNTS, seed=seed)
        recorded(tmp_path, "pgd_at", seed)
    recorded(tmp_path, "dynat", 1)
    (tmp_path / "metrics/runs/attack/toy/dynat/1.json").unlink()
    assert rows(tmp_path)["dynat"][0] == "1"
    assert sentence(tmp_path, "No record").endswith(
        "No record of these weights: trades/0, trades/1, dynat/0, attack of dynat/1."
    )
    for method in ("trades", "dynat"):
        for seed in (0, 1):
            recorded(tmp_path, method, seed)
    rows(tmp_path)
    assert "No record" not in (tmp_path / "metrics/runs/cost.md").read_text()


def test_a_record_of_other_weights_than_the_accuracies_does_not_count(select: Any, tmp_path: Path) -> None:
    """As after another experiment, whose records are the last that were written."""
    select(0)
    for method in ("pgd_at", "dynat"):
        synthetic.write(tmp_path, method, COUNTS, aa={100: 40})
        recorded(tmp_path, method, 0)
    record(tmp_path, "train", "dynat", 0, 7200, model_sha256="other")
    assert rows(tmp_path)["dynat"][:4] == ["1", "—", "—", "0.5000"]
    assert "train of dynat/0" in sentence(tmp_path, "No record")
    assert "dynat" not in figure(tmp_path)


def test_different_devices_are_named_and_do_not_compare(select: Any, tmp_path: Path) -> None:
    select(0)
    warning = "made on different devices: their hours do not compare"
    for method in ("pgd_at", "trades", "dynat"):
        synthetic.write(tmp_path, method, COUNTS, aa={100: 40})
        recorded(tmp_path, method, 0)
    assert rows(tmp_path)["dynat"][-1] == "1 × a GPU"
    assert warning not in (tmp_path / "metrics/runs/cost.md").read_text()
    recorded(tmp_path, "dynat", 0, hardware=CPU)
    found = rows(tmp_path)
    assert [found[method][-1] for method in ("pgd_at", "dynat")] == ["1 × a GPU", "1 × a CPU"]
    assert sentence(tmp_path, warning)
    assert "dynat, a CPU" in figure(tmp_path)
    assert "pgd_at, a GPU" in figure(tmp_path)


def test_the_figure_has_whoever_was_trained_and_attacked_where_they_are(select: Any, tmp_path: Path) -> None:
    select(0)
    for method, seconds, robust in (("pgd_at", 1, 40), ("trades", 3, 60), ("dynat", 2, 0)):
        aa = {100: robust} if robust else None
        synthetic.write(tmp_path, method, COUNTS, aa=aa)
        record(tmp_path, "train", method, 0, seconds)
    rows(tmp_path)
    drawn = figure(tmp_path)
    found = re.findall(r'<use xlink:href="[^"]+" x="([\d.]+)" y="([\d.]+)" style="fill: var', drawn)
    (_, low), (_, high) = sorted((float(x), float(y)) for x, y in found)
    assert low > high  # the cheaper one is less robust: further down the page
    assert {"pgd_at", "trades"} <= {*re.findall(r">([^<>]+)</text>", drawn)}
    assert "dynat" not in drawn  # no AutoAttack
    ticks = [float(each) for each in re.findall(r">(0\.\d+)</text>", drawn)]
    assert len(ticks) == len({*ticks}) > 2  # with all their digits


def test_the_same_inputs_give_the_same_bytes_and_nothing_from_elsewhere(select: Any, tmp_path: Path) -> None:
    select(0)
    synthetic.write(tmp_path, "dynat", COUNTS, aa={100: 40})
    recorded(tmp_path, "dynat", 0, hardware={**GPU, "accelerator": "<script>"})
    written = []
    for _ in range(2):
        rows(tmp_path)
        written.append([(tmp_path / f"metrics/runs/cost.{kind}").read_bytes() for kind in ("md", "html")])
    assert written[0] == written[1]
    page = written[0][1].decode()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', page) == ["../report.html"]


def test_without_any_record_it_is_one_line_that_says_what_to_run(select: Any, tmp_path: Path) -> None:
    select(0)
    synthetic.write(tmp_path, "pgd_at", COUNTS)
    with pytest.raises(UserError, match=r"^metrics/runs: no record of a selected run; dvc repro .*$"):
        cost.write(tmp_path)
    assert not (tmp_path / "metrics/runs").exists()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", json.dumps({"seconds": "x", "model_sha256": "dynat-0"})]
)
def test_a_broken_record_is_one_line_with_its_name(content: str, select: Any, tmp_path: Path) -> None:
    select(0)
    synthetic.write(tmp_path, "dynat", COUNTS)
    recorded(tmp_path, "dynat", 0)
    (tmp_path / "metrics/runs/train/toy/dynat/0.json").write_text(content)
    with pytest.raises(UserError, match=r"^metrics/runs/train/toy/dynat/0\.json: [^\n]*dvc repro[^\n]*$"):
        cost.write(tmp_path)


def test_an_undecided_claim_has_the_price_of_a_further_seed_of_its_methods(
    select: Any, tmp_path: Path
) -> None:
    select(0)
    for method in ("pgd_at", "trades", "dynat"):
        synthetic.write(tmp_path, method, COUNTS, aa={40: 27})
        recorded(tmp_path, method, 0)
    cost.write(tmp_path)
    text = (tmp_path / "metrics/runs/cost.md").read_text()
    table = synthetic.rows(text, 1)
    assert table["c10-static"] == {
        "Claim": "c10-static",
        "Methods": "dynat, pgd_at",
        "A further seed": "3.0000",  # of each an hour of training and half an hour of evaluation
    }
    assert table["c10-clean"]["A further seed"] == "4.5000"
    assert "undecided claims" in (tmp_path / "metrics/runs/cost.html").read_text()
