"""The paper's claims, held against their own n and against what was run here; ``docs/claims.md`` explains.

A claim holds if all of its comparisons do: its p is the largest of theirs. One comparison that is
significantly the other way round contradicts it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain, product
from typing import Any

from dynat.paper.cells import name
from dynat.paper.matrices import ONE, SEVERAL
from dynat.paper.pairs import OVERFITTING, Judged, compare
from dynat.paper.published import claims, slips, values
from dynat.paper.statistics import ALPHA, Paired, holm, images_needed, seeds_needed, unpaired
from dynat.paper.tables import Item, Table

Comparison = tuple[str, str, str]  # the method claimed to be better, the other one, and the column
NOT_RUN, SUPPORTED, CONTRADICTED, UNDECIDED = "not run", "supported", "contradicted", "undecided"
UNTOLD = "no verdicts of the guide are stored"
PUBLISHED = (
    "Every comparison that the paper makes, in other words. Published: the comparison on which the claim "
    "hangs, the least certain of those it makes, with the 95 % interval for independent samples, in points; "
    "a paired one cannot be told from accuracies. Where nothing tells n it is taken as 10,000, in the "
    "paper's favour. Here: the verdict in the paper's own setting."
)
DECIDED = (
    "{what} A claim is supported if all of its comparisons are ahead and significant, contradicted if one is "
    "significantly behind, at 5 % after Holm's correction over the {m} distinct claims of this table; p is "
    "after it. Compared: the comparison that decides, of how many; its interval is not corrected. {basis}"
)
TRANSFERRED = (
    "The paper's claims transferred to a setting, or a way of training, that it does not have: they say "
    "nothing of the paper's own."
)


@dataclass(frozen=True)
class Decision:
    """A claim in a setting."""

    claim: str  # its key
    setting: str
    transferred: bool  # to a setting that is not the claim's own
    found: dict[Comparison, Paired]  # those of its comparisons that have been run
    absent: tuple[str, ...]  # methods whose comparisons have not
    distinct: int = 1  # claims of the setting, for the correction
    p: float = 1.0  # Holm-corrected over the claims of the setting
    verdict: str = NOT_RUN

    @property
    def deciding(self) -> Comparison:
        """The comparison furthest behind if one is behind, else the one that is least certain to be ahead."""
        behind = [key for key, each in self.found.items() if each.difference < 0]
        if behind:
            return min(behind, key=lambda key: self.found[key].p)
        return max(self.found, key=lambda key: self.found[key].p)

    @property
    def uncorrected(self) -> float:
        """p of the deciding comparison; if it is behind, with Bonferroni's correction over all of them."""
        each = self.found[self.deciding]
        return min(1.0, each.p * len(self.found)) if each.difference < 0 else each.p


def decisions(settings: Iterable[str], judged: Judged, modern: Collection[str] = ()) -> list[Decision]:
    """Every claim in its own setting, then in each of ``settings`` that the paper does not have.

    One that is trained under the ``modern`` regime is none of the paper's.
    """
    found, table = [], claims()
    others = [each for each in settings if each not in table["setting"].array or each in modern]
    for setting in [*dict.fromkeys(each for each in table["setting"] if each not in ("", *others)), *others]:
        of = table[(table["setting"] == setting) | (setting in others)]
        rows = of.to_dict("index").items()
        ran = [_run(str(key), claim, setting, judged, setting in others) for key, claim in rows]
        found += _corrected(ran)
    return found


def _run(key: str, claim: dict[Any, Any], setting: str, judged: Judged, transferred: bool) -> Decision:
    found, absent = {}, []
    for a, b, column in dict.fromkeys(product(*_recipes(claim), claim["columns"])):
        runs = [judged.get((setting, method, column), {}) for method in (a, b)]
        if a != b and (each := compare(*runs)):
            found[a, b, column] = each
        elif a != b:
            absent += [method for method, own in ((a, runs[0]), (b, runs[1])) if not own]
    return Decision(key, setting, transferred, found, tuple(dict.fromkeys(absent)))


def _recipes(claim: dict[Any, Any]) -> list[list[str]]:
    """The recipes of the rows that a claim calls better, and of those that it calls worse."""
    recipes = values().drop_duplicates("row").set_index("row")["recipe"].to_dict()
    return [[recipes[row] for row in claim[side]] for side in ("better", "worse")]


def _corrected(found: list[Decision]) -> list[Decision]:
    """With p and verdicts; claims of the same comparisons, as of two data sets, count once."""
    family = {frozenset(each.found): each.uncorrected for each in found if each.found}
    ps = dict(zip(family, holm([*family.values()]), strict=True))
    decided = []
    for each in found:
        if each.found:
            p, ahead = ps[frozenset(each.found)], each.found[each.deciding].difference > 0
            verdict = UNDECIDED if p > ALPHA else SUPPORTED if ahead else CONTRADICTED
            each = replace(each, distinct=len(family), p=p, verdict=verdict)
        decided.append(each)
    return decided


def claim_tables(found: list[Decision]) -> list[Table]:
    """All claims as published, then a table per setting in which one has been run, then the paper's slips."""
    settings = dict.fromkeys(each.setting for each in found if each.found)
    decided = [_decided(each, [d for d in found if d.setting == each]) for each in settings]
    return [_published(found), *decided, _slips()]


def _published(found: list[Decision]) -> Table:
    own = {each.claim: each for each in found if not each.transferred}
    head = ["Claim", "What it says", "Where", "Published", "n", "Its n carries it", "Here"]
    table = Table("The paper's claims", PUBLISHED, head)
    for key, claim in claims().to_dict("index").items():
        text, n, carried, notes = _weakest(claim)
        verdict = own[key].verdict if key in own else f"{UNDECIDED}: {UNTOLD}"
        methods = tuple(dict.fromkeys(chain(*_recipes(claim))))
        label = Item(str(key), setting=claim["setting"], methods=methods)
        items = [*map(Item, (claim["text"], claim["place"])), Item(text, notes)]
        table.rows.append([label, *items, *map(Item, (n, carried, verdict))])
    return table


def _weakest(claim: dict[Any, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    """The published comparison on which a claim hangs, its n, whether that carries it, and footnotes."""
    paper, compared = values().to_dict("index"), []
    for a, b, column in product(claim["better"], claim["worse"], claim["columns"]):
        if a != b and (key := f"{a}/{column}") in paper:
            ours, theirs = paper[key], paper[f"{b}/{column}"]
            counts = float(ours["published"]), ours["images"], float(theirs["published"]), theirs["images"]
            gap = Decimal(ours["published"]) - Decimal(theirs["published"])
            ends = unpaired(*counts) if ours["images"] and theirs["images"] else None
            compared.append((ends[0] if ends else float(gap), gap, ends, ours, theirs))
    if not compared:
        return "", "", "no number is given", ()
    _, gap, ends, ours, theirs = min(compared, key=lambda each: each[0])
    text = f"{ours['method']} − {theirs['method']}, {name(ours['column'])}: {gap:+.2f}"
    if ends is None:
        return text, "mixed", "an average has no interval" if gap > 0 else "its own table denies it", ()
    carried = "yes" if ends[0] > 0 else "no" if gap > 0 else "its own table denies it"
    differs = claim["stated"] and Decimal(claim["stated"]) != gap
    notes = (f"the text says +{claim['stated']}",) if differs else ()
    n = " and ".join(f"{each:,}" for each in dict.fromkeys((ours["images"], theirs["images"])))
    return f"{text} [{ends[0]:.1f}, {ends[1]:.1f}]", n, carried, notes


def _decided(setting: str, found: list[Decision]) -> Table:
    ran = [each for each in found if each.found]
    several = any(each.seeds > 1 for decision in ran for each in decision.found.values())
    what = TRANSFERRED if ran[0].transferred else "The paper's claims in their own setting."
    text = DECIDED.format(what=what, m=ran[0].distinct, basis=SEVERAL if several else ONE)
    if silent := [each.claim for each in found if not each.found and claims().at[each.claim, "better"]]:
        text += f" {NOT_RUN.capitalize()} here: {', '.join(silent)}."
    verdicts = [each.verdict for each in ran]
    counts = [f"{verdicts.count(each)} {each}" for each in (SUPPORTED, CONTRADICTED, UNDECIDED)]
    head = ["Claim", "What it says", "Compared", "Difference", "n", "p", "Verdict", "It would take"]
    title = f"Transferred to {setting}" if ran[0].transferred else setting
    table = Table(title, f"{text} {', '.join(counts)}.", head)
    for each in ran:
        (a, b, column), pair = each.deciding, each.found[each.deciding]
        which = "Robust overfitting" if column == OVERFITTING else name(column)
        of = f" (1 of {len(each.found)})" if len(each.found) > 1 else ""
        notes = (f"without {', '.join(each.absent)}: not run",) if each.absent else ()
        gap = f"{pair.difference:+.2f} [{pair.low:.1f}, {pair.high:.1f}]"
        says, compared = str(claims().at[each.claim, "text"]), f"{a} − {b}, {which}{of}"
        methods = tuple(dict.fromkeys(chain(*(key[:2] for key in each.found))))
        label = Item(each.claim, setting=setting, methods=methods)
        items = [*map(Item, (says, compared, gap, str(pair.n), f"{each.p:.2g}"))]
        table.rows.append([label, *items, Item(each.verdict, notes), Item(needed(each))])
    return table


def needed(decision: Decision) -> str:
    """What would decide an undecided claim if the difference were what it seems; empty of a decided one.

    With 80 % power, at the level that Bonferroni's correction leaves, which Holm's never undercuts.
    """
    if decision.verdict != UNDECIDED:
        return ""
    pair = decision.found[decision.deciding]
    alpha = ALPHA / decision.distinct / (len(decision.found) if pair.difference < 0 else 1)
    images = images_needed(pair.difference, pair.disagreement, alpha)
    if images is None:
        return "no number: the difference is 0"
    if pair.seeds == 1:
        return f"{max(images, pair.n):,} images for these networks; more seeds for the methods"
    seeds = seeds_needed(pair.difference, pair.training_sd, pair.sample_se, alpha)
    return f"{seeds} seeds" if seeds else f"more images than {pair.n}, whatever the seeds: {images:,} for one"


def _slips() -> Table:
    text = "Where the paper contradicts its own tables or its published code, or is silent; see "
    text += "`docs/methods.md`, 3.5."
    columns = ["place", "paper", "found", "kind"]
    rows = [[Item(str(each[column])) for column in columns] for each in slips().to_dict("records")]
    return Table("The paper's slips", text, ["Where", "The paper", "What is found", "Kind"], rows)
