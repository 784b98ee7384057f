"""An audit as lines, a summary, or data."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from dynat.audit.link import Audited, Link, sound

SCREEN = 30  # lines
Cells = dict[str, dict[str, Any]]  # of cells.json


def print_cell(cells: Cells, key: str, links: list[Link]) -> None:
    """A line per link."""
    cell = cells[key]
    paper = f"    paper {cell['published']}, difference {cell['difference']}" if "published" in cell else ""
    print(f"{key} = {cell.get('text')}{paper}")
    for link in links:
        print(link.line)
    faulty, unknown = _count(links, "broken"), _count(links, "absent")
    checked = len(links) - unknown
    held = f"{faulty} of {checked} links broken" if faulty else f"all {checked} links hold"
    print(held + (f", {unknown} could not be checked here" if unknown else ""))


def print_many(cells: Cells, found: Audited) -> None:
    """Each broken link once with the cells that it concerns, and a summary."""
    concerned: dict[Link, list[str]] = {}
    for key, links in found.items():
        for link in links:
            concerned.setdefault(link, []).append(key)
    faulty = [link for link in concerned if link.state == "broken"]
    for link in faulty[:SCREEN]:
        keys = concerned[link]
        print(f"{link.line}  [{keys[0] if len(keys) == 1 else f'{len(keys)} cells'}]")
    if len(faulty) > SCREEN:
        print(f"✗ and {len(faulty) - SCREEN} more; --json lists them")
    if len(found) <= 12:
        for key, links in found.items():
            print(f"{'✓' if sound(links) else '✗'} {key}  {cells.get(key, {}).get('text', '')}")
    holding = [sound(links) for key, links in found.items() if key in cells]
    print(f"{len(holding)} cells: {sum(holding)} hold, {len(holding) - sum(holding)} do not")
    unknown = _count(concerned, "absent")
    print(f"{len(concerned)} links: {len(faulty)} broken, {unknown} could not be checked here")


def print_stages(found: Audited, outputs_missing: Collection[str]) -> None:
    """How many stages were not wholly checked or not run by this code, where there are any."""
    if outputs_missing:
        text = "stages whose outputs are not here, so that only the hashes in dvc.lock agree"
        print(f"{text}: {len(outputs_missing)}")
    links = [link for each in found.values() for link in each]
    if accepted := {link.subject for link in links if link.state == "accepted"}:
        print(f"{len(accepted)} stages accepted by proof, not run by this code")


def as_json(cells: Cells, found: Audited) -> list[dict[str, Any]]:
    """The audit as data."""
    return [
        {
            "cell": key,
            "text": cells.get(key, {}).get("text"),
            "ok": sound(links),
            "links": [asdict(link) for link in links],
        }
        for key, links in found.items()
    ]


def _count(links: Collection[Link], state: str) -> int:
    return sum(link.state == state for link in links)
