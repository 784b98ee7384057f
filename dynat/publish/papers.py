"""The paper of a method, as leaderboards cite it: ``papers.json``, by recipe."""

import json
from importlib.resources import files
from typing import TypedDict


class Paper(TypedDict):
    """``key``, as RobustBench names models, is of author, year and first word; the rest is as it prints."""

    key: str
    link: str
    name: str  # the title
    authors: str  # with commas between them
    venue: str


def paper_of(method: str) -> Paper:
    """The paper of a recipe; one that has none is named by itself, its link and authors left empty."""
    known: dict[str, Paper] = json.loads(files("dynat.publish").joinpath("papers.json").read_text("utf-8"))
    family = "dynat" if method.startswith("dynat") else method
    return known.get(family) or Paper(key=method, link="", name=method, authors="", venue="N/A")
