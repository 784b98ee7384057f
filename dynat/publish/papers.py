"""The paper of a method, as leaderboards cite it: ``papers.json``, by recipe."""

import json
from importlib.resources import files
from typing import TypedDict

from dynat.config.params import recipe_of


class Paper(TypedDict):
    """``key``, as RobustBench names models, is of author, year and first word; the rest is as it prints."""

    key: str
    link: str
    name: str  # the title
    authors: str  # with commas between them
    venue: str


def paper_of(method: str, trained_here: bool = True) -> Paper:
    """The paper of a recipe; one that has none is named by itself, its link and authors left empty."""
    known: dict[str, Paper] = json.loads(files("dynat.publish").joinpath("papers.json").read_text("utf-8"))
    recipe = recipe_of(method)
    family = "dynat" if recipe.startswith("dynat") and recipe != "dynat_robust_guide" else recipe
    return (known.get(family) if trained_here else None) or Paper(
        key=method, link="", name=method, authors="", venue="N/A"
    )
