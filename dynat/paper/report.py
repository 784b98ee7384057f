"""``metrics/report.html``: tables beside the published values, figures, and the source of every number.

One self-contained file without scripts; a number opens the sheet that says how it was counted.
"""

import re
import shlex
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path

from dynat.paper.images import data_uri, perturbed
from dynat.paper.markup import Entry, Table, letters
from dynat.paper.measurements import Measurement
from dynat.paper.published import TITLES
from dynat.paper.tables import Cell, find, name, radius
from dynat.paper.tabulation import Tabulation

INTRODUCTION = """
<p>A reproduction of <cite>Dynamic Label Adversarial Training for Deep Learning Robustness Against Adversarial
Attacks</cite> (Liu et al., ICONIP 2024, <a href="https://arxiv.org/abs/2408.13102">arXiv 2408.13102</a>).
Every number is counted from stored per-sample verdicts. <strong>Choose a number</strong> to see which ones,
and the command that audits it down to weights, data and commit.</p>
"""
CITATION = """
<p>The paper:</p>
<pre>@inproceedings{liu2024dynamic,
  title     = {Dynamic Label Adversarial Training for Deep Learning Robustness Against Adversarial Attacks},
  author    = {Liu, Zhenyu and Duan, Haoran and Liang, Huizhi and Long, Yang and Snasel, Vaclav and
               Nicosia, Guiseppe and Ranjan, Rajiv and Ojha, Varun},
  booktitle = {International Conference on Neural Information Processing (ICONIP)},
  year      = {2024},
  note      = {arXiv:2408.13102}
}</pre>
<p>The software and these numbers: <code>CITATION.cff</code> of this repository, with the commit that holds
this report. A published number should carry its n, ε, seed and interval, and the attack's warnings.</p>
"""
HYBRIDS = ("gairat", "dynat_gairat", "dynat_inner_gairat")  # of Figure 5
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the browser enforces "no network"


def render(found: Tabulation, root: Path = Path()) -> str:
    """The report; ``root`` holds data and witnesses for the images. Equal results give equal text."""
    sections = [(setting, _setting(found, setting, root)) for setting in found.params.settings]
    sections += [(f"table{number}", tables_html(found, f"table{number}")) for number in TITLES]
    links = "".join(f'<li><a href="#{each}">{escape(_title(each))}</a></li>' for each, _ in sections)
    body = "".join(
        f'<section id="{each}"><h2>{escape(_title(each))}</h2>{text}</section>' for each, text in sections
    )
    style = files("dynat.paper").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dynat: results</title><style>{style}</style></head><body>"
        f"<header><h1>Dynamic label adversarial training, reproduced</h1>{INTRODUCTION}"
        f'<nav><ul>{links}<li><a href="#cite">How to cite</a></li></ul></nav></header><main>{body}'
        f'<section id="cite"><h2>How to cite</h2>{CITATION}</section></main>'
        f"{sheets_html(found)}</body></html>\n"
    )


def _title(section: str) -> str:
    number = section.removeprefix("table")
    return TITLES[int(number)] if number.isdigit() and int(number) in TITLES else f"Setting {section}"


def _setting(found: Tabulation, setting: str, root: Path) -> str:
    return tables_html(found, setting) + "".join(_figures(found, setting)) + _images(found, setting, root)


# --------------------------------------------------------------------------------------------------- tables


def tables_html(found: Tabulation, file: str) -> str:
    """The tables of one file as HTML, each with its lead: ``file`` is a setting or ``table1``."""
    parts = []
    for rank, table in enumerate(found.tables[file]):
        heading = f"<h3>{escape(table.title)}</h3>" if rank else ""
        lead = re.sub(r"`(.*?)`", r"<code>\1</code>", escape(table.lead, quote=False))
        parts.append(f"{heading}<p>{lead}</p>{_table(table)}")
    return "".join(parts)


def _table(table: Table) -> str:
    notes = table.footnotes()
    head = "".join(f"<th>{_two_lines(text)}</th>" for text in table.head)
    body = []
    for row in table.rows:
        label, *rest = row
        kind = "difference" if rest and rest[0].text == "difference" else "first" if label.text else ""
        cells = "".join(_number(entry, notes) for entry in rest)
        title = escape(label.text).replace("_", "_<wbr>") + _marks(label, notes)
        body.append(f'<tr class="{kind}"><th>{title}</th>{cells}</tr>')
    listed = "".join(f"<li><sup>{letters(i)}</sup> {escape(note)}</li>" for i, note in enumerate(notes))
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{text}</div>' + (f'<ul class="notes">{listed}</ul>' if listed else "")


def _number(entry: Entry, notes: list[str]) -> str:
    if entry.text in ("paper", "here", "difference"):
        return f'<td class="label">{entry.text}{_marks(entry, notes)}</td>'
    if entry.key is None:
        return f"<td>{escape(entry.text)}{_marks(entry, notes)}</td>"
    place = slug(entry.key)
    value, _, rest = entry.text.partition(" ")
    rest = f"<small>{escape(rest)}</small>" if rest else ""
    return f'<td id="n-{place}"><a href="#a-{place}">{value}</a>{_marks(entry, notes)}{rest}</td>'


def _marks(entry: Entry, notes: list[str]) -> str:
    ordered = sorted(entry.notes, key=notes.index)
    raised = [f'<span title="{escape(note)}">{letters(notes.index(note))}</span>' for note in ordered]
    return f"<sup>{','.join(raised)}</sup>" if raised else ""


def _two_lines(heading: str) -> str:
    first, _, rest = heading.partition(" (")
    return escape(first) + (f"<small>{escape(rest.removesuffix(')'))}</small>" if rest else "")


def slug(key: str) -> str:
    """A cell's key as part of an HTML id."""
    return re.sub(r"[^\w.-]+", "-", key).strip("-")


# --------------------------------------------------------------------------------------- a number's own sheet


def sheets_html(found: Tabulation) -> str:
    """A sheet for every cell, also of a CSV alone: its counts, its files and the command that audits it."""
    keys = {e.key for ts in found.tables.values() for t in ts for row in t.rows for e in row}
    return "".join(
        _sheet(key, cell, f"n-{slug(key)}" if key in keys else key.split("/")[0])
        for key, cell in found.cells.items()
    )


def _sheet(key: str, cell: Cell, back: str) -> str:
    done, place = cell.printed, slug(key)
    gap = f"; paper {cell.extra['published']}, difference {cell.extra['difference']}" if cell.extra else ""
    caveats = dict.fromkeys(caveat for m in cell.measurements for caveat in m.caveats)
    return (
        f'<section class="audit" id="a-{place}"><a class="close" href="#{back}">close</a>'
        f"<h4>{escape(key)}</h4><p><strong>{escape(done.text)}</strong> ({done.rule}{gap})</p>"
        f"<ul>{''.join(map(_source, cell.measurements))}</ul>"
        + "".join(f"<p>{escape(caveat)}</p>" for caveat in caveats)
        + f"<pre>uv run python -m dynat.audit {escape(shlex.quote(key))}</pre></section>"
    )


def _source(measurement: Measurement) -> str:
    """Where one count comes from; the links work where the report lies beside the other metrics."""
    source = measurement.source
    metrics, verdicts = (
        f'<a href="{file.removeprefix("metrics/")}">{file}</a>' for file in (source.file, source.verdicts)
    )
    attack = "AutoAttack" if source.attack == "square" else name(source.attack)
    robust = "correct when clean" if source.attack == "clean" else f"robust to {attack}"
    return (
        f"<li>{measurement.robust} of {source.n} {robust}: ε = {radius(measurement.epsilon)}, attack seed "
        f"{measurement.attack_seed}, training seed {source.seed}, {source.checkpoint} epoch"
        f"<br>{verdicts}<br>{metrics} {source.pointer}</li>"
    )


# -------------------------------------------------------------------------------------------------- figures


def _figures(found: Tabulation, setting: str) -> Iterator[str]:
    from dynat.paper import figures  # matplotlib, of which the audit needs nothing

    params = found.params
    methods = [*params.baselines, *params.variants]
    histories = {m: [h for h in found.histories[setting, m].values() if h] for m in methods}
    histories = {method: seeds for method, seeds in histories.items() if seeds}
    if histories:
        yield _training(setting, histories)
    clean = {m: cell for m in methods if (cell := _cell(found, setting, m, "clean"))}
    if clean:
        rows = [(m, *_interval(cell), int(m in params.variants)) for m, cell in clean.items()]
        yield _figure(
            "Clean accuracy across methods (as Figure 4); the DYNAT family in the second colour.",
            figures.intervals(f"clean-{setting}", rows, "clean accuracy, %"),
        )
    hybrids = [method for method in clean if method in HYBRIDS]
    columns = [c for c in ("clean", "pgd20", "cw", "aa") if all(_cell(found, setting, m, c) for m in hybrids)]
    if len(hybrids) > 1:
        values = {
            method: [cell.printed.mean for c in columns if (cell := _cell(found, setting, method, c))]
            for method in hybrids
        }
        yield _figure(
            "GAIRAT against its combination with dynamic labels (as Figure 5).",
            figures.bars(f"gairat-{setting}", [name(c) for c in columns], values),
        )
    curves, counts = {}, set[int]()
    for method in methods:
        run = [result for result in found.results[setting, method].values() if result.epsilon_curve]
        counts |= {result.epsilon_n for result in run}
        if run:
            curves[method] = [result.epsilon_curve for result in run]
    if curves:
        images = " or ".join(map(str, sorted(counts)))
        yield _figure(
            f"Accuracy against the radius of PGD-20, on the first {images} test images; baselines dashed, "
            f"the DYNAT family solid{'; means over seeds' * any(len(run) > 1 for run in curves.values())}.",
            figures.against_epsilon(f"epsilon-{setting}", curves, {*params.baselines}),
        )


def _cell(found: Tabulation, setting: str, method: str, column: str) -> Cell | None:
    source = find(found.cells, setting, method, column, found.params)
    return source[1] if source else None


def _interval(cell: Cell) -> tuple[float, float, float]:
    """Value and interval: Wilson's of one seed, one standard deviation to both sides of several."""
    numbers, mean = cell.printed.numbers, cell.printed.mean
    if numbers["sd"]:
        return mean, mean - float(numbers["sd"]), mean + float(numbers["sd"])
    return mean, float(numbers["low"] or mean), float(numbers["high"] or mean)


def _training(setting: str, histories: dict[str, list[list[dict[str, str]]]]) -> str:
    """Figure 3, DYNAT against LBGAT where both were run, and a panel for each method."""
    from dynat.paper import figures

    text = ""
    rival = next((method for method in ("lbgat0", "lbgat6") if method in histories), None)
    if rival and "dynat" in histories:
        pair = {method: histories[method] for method in ("dynat", rival)}
        text = _figure(
            "Training and test accuracy per epoch, DYNAT against LBGAT (as Figure 3).",
            figures.training(f"training-{setting}", pair),
        )
    panels = [figures.training(f"training-{setting}-{m}", {m: seeds}) for m, seeds in histories.items()]
    caption = (
        "Accuracy of the target after each epoch, on natural training and test images and under PGD on the "
        "held-out images that choose the epoch."
    )
    return text + _figure(caption, f'<div class="panels">{"".join(panels)}</div>')


def _figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _images(found: Tabulation, setting: str, root: Path) -> str:
    """Natural, perturbed and difference images of DYNAT, or else of the first method with a witness."""
    methods = [*found.params.variants, *found.params.baselines]
    for method in sorted(methods, key=lambda each: each != "dynat"):
        grid = perturbed(root, setting, method, found.params.seeds[0])
        if not grid:
            continue
        rows = [f"<th></th>{''.join(f'<td><small>{label}</small></td>' for _, label, _ in grid)}"]
        for rank, title in enumerate(("natural", "perturbed", "difference")):
            pictures = [
                f'<td><img src="{data_uri(images[rank])}" alt="{title} image {index}, class {label}"></td>'
                for index, label, images in grid
            ]
            rows.append(f"<th>{title}</th>{''.join(pictures)}")
        caption = (
            f"The first test images that PGD-20 makes {method} misclassify, under their true class. The "
            "difference is amplified to fill the range; grey means none."
        )
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        return _figure(caption, f'<div class="scroll"><table class="images">{table}</table></div>')
    return ""
