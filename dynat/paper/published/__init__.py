"""The paper's Tables 1-4 as data: every value as printed there, with what is known of its origin.

``tables.csv`` has a line per value in the order of print; its ``notes`` are keys of ``notes.csv``, which
says which of them make a value doubtful, and of how many images it then is. ``claims.csv`` has what the paper
says of those values, ``slips.csv`` where it contradicts itself or its code.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import pandas as pd

from dynat.config.fields import KeyedError, check_known
from dynat.errors import UserError

TITLES = {
    1: "Table 1: CIFAR-10, target WRN-34-10",
    2: "Table 2: CIFAR-100, target WRN-34-10",
    3: "Table 3: combined with GAIRAT, CIFAR-10",
    4: "Table 4: combined with MAIL, CIFAR-10, target ResNet-18 (inferred)",
}

IMAGES = 10_000  # of the test sets of CIFAR-10 and CIFAR-100


@cache
def values() -> pd.DataFrame:
    """A row per published accuracy, in the paper's order; shared, so not to be changed in place.

    The index is the key of its cell, such as ``table1/DYNAT/aa``; in Table 3, which has its methods twice,
    with the target. Columns: ``row`` (the key without the attack), ``table`` (int), ``group`` ("Others" or
    "Ours"), ``target``, ``guide`` (empty without one), ``method`` (as the paper calls it), ``setting`` and
    ``recipe`` (what reproduces it), ``column``, ``counterpart`` (the column of the results that is measured
    like it), ``published`` (percent, as printed), as tuples of text
    ``notes`` (all that is known of its origin) and ``doubts`` (why it is no reference), ``doubtful``, and
    ``images`` (int, of the test set; :data:`IMAGES` where no note says fewer; 0 for an average of several).
    """
    notes = _read("notes.csv").set_index("key")
    texts, doubtful = notes["text"].to_dict(), notes["doubtful"].eq("yes").to_dict()
    found = _read("tables.csv").rename(columns={"attack": "column", "value": "published"})
    keys = found["notes"].str.split()
    found["notes"] = [tuple(texts[key] for key in each) for each in keys]
    found["doubts"] = [tuple(texts[key] for key in each if doubtful[key]) for each in keys]
    found["doubtful"] = found["doubts"].map(lambda doubts: "yes" if doubts else "")
    images = notes.loc[notes["n"] != "", "n"].astype(int).to_dict()
    found["images"] = [min((images[key] for key in each if key in images), default=IMAGES) for each in keys]
    found["images"] = found["images"].mask(found["column"] == "all", 0)
    in_autoattack = keys.map(lambda each: "apgd_1000" in each)
    found["counterpart"] = found["column"].mask(in_autoattack, "aa-" + found["column"])
    target = (found["target"] + "/").where(found["table"] == "3", "")
    found["row"] = "table" + found["table"] + "/" + target + found["method"]
    return found.astype({"table": int}).set_index(found["row"] + "/" + found["column"])


def refuse_rows(weights: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Raise :class:`UserError` for a row of ``weights``, by checkpoint, that no table of the paper has.

    And for one of another setting than ``settings`` attack the checkpoint in.
    """
    rows = {str(each["row"]): each["setting"] for each in values().to_dict("records")}
    for name, row in weights.items():
        try:
            check_known(f"checkpoint.{name}.row", row, rows)
            if rows[row] != settings[name]:
                reason = f"{row} is of {rows[row]}, checkpoints.{name} of {settings[name]}; set it to null"
                raise KeyedError(f"checkpoint.{name}.row", reason)
        except KeyedError as error:
            raise UserError(f"params.yaml: {error}") from None


@cache
def claims() -> pd.DataFrame:
    """A row per comparative claim; shared, so not to be changed in place.

    The index is its ``key``. Columns: ``place`` in the paper, ``better`` and ``worse`` (tuples of rows of
    :func:`values`; every one of the first is claimed to be ahead of every one of the others), ``columns``
    (tuple; in each of them), ``stated`` (points that the text gives, or empty), ``text`` in our words, and
    ``setting``. Where no accuracy in the tables speaks of it, rows and setting are empty.
    """
    found, rows = _read("claims.csv").set_index("key"), values().drop_duplicates("row").set_index("row")
    groups: dict[str, list[str]] = {}
    for row, each in rows.iterrows():
        groups.setdefault(f"table{each['table']}/{each['group']}", []).append(str(row))
    for side in ("better", "worse"):
        names = found[side].str.split()
        found[side] = names.map(lambda each: tuple(row for name in each for row in groups.get(name, [name])))
    found["columns"] = found["columns"].str.split().map(tuple)
    settings = rows["setting"].to_dict()
    found["setting"] = found["better"].map(lambda each: settings[each[0]] if each else "")
    return found


def slips() -> pd.DataFrame:
    """Where the paper contradicts itself or its code: ``place``, ``paper``, ``found``, ``kind``."""
    return _read("slips.csv")


def _read(name: str) -> pd.DataFrame:
    with files(__name__).joinpath(name).open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=object, keep_default_na=False)
