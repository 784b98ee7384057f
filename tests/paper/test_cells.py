"""``cells.json`` names what to count for every printed number; tables hold just that."""

import json
import re
import statistics
from pathlib import Path

import pytest
from synthetic import ATTACKS, COUNTS, files, params, records, recount, rows, stated, write

from dynat.config.fields import radius
from dynat.paper.cells import average


def test_every_cell_can_be_recomputed_from_the_verdicts_it_names(tmp_path: Path) -> None:
    for method in ("pgd_at", "dynat"):
        for seed in (0, 1):
            write(
                tmp_path,
                method,
                {k: v - 3 * seed for k, v in COUNTS.items()},
                seed=seed,
                last=5,
                aa={40: 27, 80: 50},
            )
    cells = json.loads(files(params(["pgd_at"], ["dynat"], (0, 1)), tmp_path)["metrics/tables/cells.json"])
    assert len(cells) == 2 * 3 * (
        len(ATTACKS) * 2 + 2 + 1
    )  # methods; seeds and their mean; best, last; AA; All
    for key, cell in cells.items():
        by_seed: dict[int, list[float]] = {}
        for source in cell["sources"]:
            seed, value = recount(tmp_path, source)
            by_seed.setdefault(seed, []).append(value)
            pointed: object = json.loads((tmp_path / source["file"]).read_text())
            for part in source["pointer"].strip("/").split("/"):
                pointed = pointed[part]  # type: ignore[index]
            assert pointed == pytest.approx(value, abs=1e-4), key
        means = [statistics.mean(values) for values in by_seed.values()]
        assert cell["text"].startswith(f"{statistics.mean(means):.2f}"), key
        assert cell["numbers"]["accuracy"] == f"{statistics.mean(means):.2f}"
        if "/mean/" in key:
            assert len(by_seed) == 2
            assert cell["text"].endswith(f" ± {statistics.stdev(means):.2f}")
    assert [s["attack"] for s in cells["toy/dynat/0/all"]["sources"]] == [
        "pgd10",
        "pgd20",
        "pgd50",
        "cw",
        "square",
    ]
    assert cells["toy/dynat/0/all"]["rule"] == "average of attacks"
    assert cells["toy/dynat/0/aa"]["sources"][0]["pointer"] == "/aa/n40/accuracy"
    assert cells["toy/dynat/0/aa-n80"]["sources"][0]["n"] == 80
    assert cells["toy/dynat/1/last-pgd20"]["sources"][0]["checkpoint"] == "last"


def test_tables_print_the_cells_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "pgd_at", COUNTS, last=5, aa={40: 27})
    found = files(params(["pgd_at"], ["dynat"]), tmp_path)
    cells = json.loads(found["metrics/tables/cells.json"])
    text = found["metrics/tables/toy.md"]
    numbers = [
        v for t in (0, 1) for row in rows(text, t).values() for v in row.values() if re.match(r"\d+\.", v)
    ]
    here = [cell["text"] for cell in cells.values() if "metrics/tables/toy.md" in cell["tables"]]
    assert sorted(numbers) == sorted(here)
    lines = {row["cell"]: row for row in records(found["metrics/tables/toy.csv"]) if row["cell"]}
    assert set(lines) == {key for key, cell in cells.items() if "metrics/tables/toy.csv" in cell["tables"]}
    for key, row in lines.items():
        assert {name: row[name] for name in cells[key]["numbers"]} == cells[key]["numbers"]
    assert lines["toy/pgd_at/0/pgd20"]["epsilon"] == "8/255"
    assert (lines["toy/pgd_at/0/pgd20"]["low"], lines["toy/pgd_at/0/pgd20"]["high"]) == tuple(
        f"{stated(74, 100)[bound]:.2f}" for bound in ("low", "high")
    )


@pytest.mark.parametrize(("epsilon", "text"), [(8 / 255, "8/255"), (0.031, "0.031"), (0.15, "0.15")])
def test_epsilon_is_written_as_people_write_it(epsilon: float, text: str) -> None:
    assert radius(epsilon) == text


def test_seeds_with_unequal_attacks_are_no_average() -> None:
    with pytest.raises(ValueError, match="unequal"):
        average([{"seed": seed, "robust": 5, "n": 10} for seed in (0, 0, 1)])
