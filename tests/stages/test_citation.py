"""``CITATION.cff`` is valid, and cites what the report cites."""

import datetime
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CITATION = (ROOT / "dynat/paper/templates/citation.html").read_text(encoding="utf-8")  # of the report
CITED = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
KEYS = {  # Citation File Format 1.2.0, the keys of a whole file
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers"),
    *("keywords", "license", "license-url", "message", "preferred-citation", "references", "repository"),
    *("repository-artifact", "repository-code", "title", "type", "url", "version"),
}


def test_citation_file_has_what_the_format_demands_and_nothing_unknown() -> None:
    assert {"cff-version", "message", "title", "authors"} <= CITED.keys() <= KEYS
    assert CITED["cff-version"] == "1.2.0"
    assert CITED["type"] in ("software", "dataset")
    assert isinstance(CITED["date-released"], datetime.date)
    paper = CITED["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["type"] == "conference-paper"
    for author in (*CITED["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"})
        assert all(isinstance(name, str) and name for name in author.values())


def test_citation_is_of_this_version_under_this_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert CITED["version"] == project["version"]
    assert CITED["license"] == project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_report_says_how_to_cite_the_paper_of_the_citation_file_and_the_software() -> None:
    paper = CITED["preferred-citation"]
    fields = {
        name: " ".join(value.split())
        for name, value in re.findall(r"^  (\w+)\s*= \{([^}]*)\}", CITATION, flags=re.MULTILINE)
    }
    assert fields["title"] == paper["title"]
    assert fields["author"] == " and ".join(
        f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]
    )
    assert fields["year"] == str(paper["year"])
    assert fields["note"].removeprefix("arXiv:") == paper["url"].rsplit("/", 1)[1]
    assert "<code>CITATION.cff</code>" in CITATION
