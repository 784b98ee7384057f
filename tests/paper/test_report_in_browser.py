"""The report in Chromium: sorting, filters and pairs do what they say, by keyboard too; all is legible."""

import csv
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, contrasts, outside, resize
from pipelines import ROOT
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.select import Select

from dynat.config.params import load
from dynat.paper.report import render
from dynat.paper.tabulation import tabulate

pytestmark = pytest.mark.slow
Page = tuple[Chrome, str]  # opened, and its address
VISIBLE = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
TEXT = """.map((element) => {
  const copy = element.cloneNode(true);
  copy.querySelectorAll("sup, small").forEach((each) => each.remove());
  return copy.textContent.trim();
});"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The report of the committed results in a Chromium."""
    with chromium() as chrome:
        file = tmp_path_factory.mktemp("page") / "report.html"
        file.write_text(render(tabulate(load(ROOT / "params.yaml"), ROOT), ROOT), encoding="utf-8")
        yield chrome, file.as_uri()


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """That report as it is opened; when the test is over nothing may stand in the console."""
    chrome, address = opened
    open_at(chrome, address)
    resize(chrome, 1280)
    yield opened
    assert chrome.get_log("browser") == []


def open_at(chrome: Chrome, address: str) -> None:
    """Load the page anew, also where only the fragment differs."""
    chrome.get("about:blank")
    chrome.get(address)


def texts(chrome: Chrome, selector: str) -> list[str]:
    """The visible texts, each without footnote marks and second line."""
    found: list[str] = chrome.execute_script(VISIBLE + TEXT, selector)
    return found


def view(chrome: Chrome) -> str:
    return str(chrome.current_url).partition("#")[2]


def press(chrome: Chrome, *keys: str) -> None:
    ActionChains(chrome).send_keys(*keys).perform()


def focus(chrome: Chrome, selector: str) -> None:
    chrome.execute_script("document.querySelector(arguments[0]).focus()", selector)


def choose(chrome: Chrome, name: str, value: str) -> None:
    Select(chrome.find_element("id", name)).select_by_value(value)


def read_cells() -> dict[str, Any]:
    """The committed ``cells.json``."""
    found: dict[str, Any] = json.loads((ROOT / "metrics/tables/cells.json").read_text(encoding="utf-8"))
    return found


def column(chrome: Chrome, table: str, number: int) -> list[str]:
    return texts(chrome, f"#{table} tbody tr > :nth-child({number})")


# ------------------------------------------------------------------------------------------ what is seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_fits_and_is_legible(page: Page, width: int, scheme: str) -> None:
    chrome, address = page
    resize(chrome, width, scheme)
    open_at(chrome, f"{address}#setting=digits&pair=digits/trades/dynat&sort=t-digits/1/descending")
    assert outside(chrome) == []
    for fragment in ("", "#a-digits-dynat-0-aa"):
        open_at(chrome, address + fragment)
        chrome.execute_script("document.querySelector('details').open = true")
        found = contrasts(chrome)
        assert len(found) > 1000
        assert [(text, round(ratio, 2)) for text, ratio in found if ratio < 4.5] == []
        assert outside(chrome) == []
    boxes = "return [...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth - e.clientWidth)"
    assert width < 1280 or set(chrome.execute_script(boxes)) == {0}, "a table does not fit"


def test_nothing_is_fetched_and_no_foreign_script_runs(page: Page, tmp_path: Path) -> None:
    chrome, address = page
    fetched = "return performance.getEntriesByType('resource').map((each) => each.name)"
    assert [each for each in chrome.execute_script(fetched) if not each.startswith("data:")] == []
    text = Path(address.removeprefix("file://")).read_text(encoding="utf-8")
    foreign = tmp_path / "foreign.html"
    foreign.write_text(text.replace("</body>", "<script>document.title = 'foreign'</script></body>"))
    open_at(chrome, foreign.as_uri())
    assert chrome.title == "dynat: results"
    (entry,) = chrome.get_log("browser")
    assert "Content Security Policy" in entry["message"]


def test_without_scripts_it_is_the_whole_page_without_controls(page: Page) -> None:
    chrome, address = page
    rows = len(texts(chrome, ".part tbody tr"))
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_at(chrome, f"{address}#setting=digits")
        assert texts(chrome, "#tools, th button") == []
        assert len(texts(chrome, ".part tbody tr")) == rows
    finally:
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# ---------------------------------------------------------------------------------------------- sorting


@pytest.mark.parametrize(
    ("table", "number"), [("t-digits-last-epoch", 5), ("t-digits-PGD-20", 3), ("t-Transferred-to-digits", 6)]
)
def test_a_heading_sorts_by_value_up_and_down_and_back(page: Page, table: str, number: int) -> None:
    chrome, _ = page
    before = column(chrome, table, number)
    labels = column(chrome, table, 1)
    value = {text: float(text.partition(" ")[0]) for text in before if text}
    up = sorted(filter(None, before), key=value.__getitem__)
    down = sorted(filter(None, before), key=value.__getitem__, reverse=True)
    head = f"#{table} thead th:nth-child({number})"
    for wanted, order in ((up, "ascending"), (down, "descending"), (before, None)):
        focus(chrome, f"{head} button")
        press(chrome, Keys.ENTER)
        now = column(chrome, table, number)
        assert (now if order is None else [*filter(None, now)]) == wanted
        assert order is None or now[len(wanted) :] == [""] * (len(before) - len(wanted)), "empty is not last"
        assert chrome.find_element("css selector", head).get_attribute("aria-sort") == order
        pairs = sorted(zip(column(chrome, table, 1), now, strict=True))
        assert pairs == sorted(zip(labels, before, strict=True)), "a row was torn apart"
        address_now = chrome.current_url
        open_at(chrome, address_now)
        assert column(chrome, table, number) == now, "the address does not keep the order"


def test_equal_values_keep_their_order_and_rows_of_a_method_stay_together(page: Page) -> None:
    chrome, _ = page
    table = "t-Table-1-CIFAR-10-target-WRN-34-10"
    kinds, names = column(chrome, table, 2), column(chrome, table, 1)
    chrome.find_element("css selector", f"#{table} thead th:nth-child(3) button").click()
    assert column(chrome, table, 2) == kinds  # paper, here, paper, here
    assert column(chrome, table, 1) != names
    clean = [float(text) for text in column(chrome, table, 3) if text]
    assert clean == sorted(clean)
    n = dict(zip(column(chrome, "t-digits-power", 1), column(chrome, "t-digits-power", 2), strict=True))
    assert len({*n.values()}) < len(n)
    for down in (False, True):
        chrome.find_element("css selector", "#t-digits-power thead th:nth-child(2) button").click()
        wanted = sorted(n, key=lambda attack: float(n[attack]), reverse=down)  # stable, so also if reversed
        assert column(chrome, "t-digits-power", 1) == wanted


# -------------------------------------------------------------------------------------------- filtering


def test_filters_leave_the_rows_about_a_setting_and_methods(page: Page) -> None:
    chrome, _ = page
    everything = texts(chrome, ".part tbody tr")
    assert texts(chrome, "#status") == [f"{len(everything)} of {len(everything)} rows."]
    choose(chrome, "setting", "digits")
    assert texts(chrome, "#table1, #table2, #table3, #table4, nav a[href='#table1']") == []
    chosen = load(ROOT / "params.yaml")
    assert column(chrome, "t-digits", 1) == [*chosen.baselines, *chosen.variants]
    focus(chrome, "summary")
    press(chrome, Keys.SPACE)
    for method in ("dynat", "trades"):
        focus(chrome, f"#methods input[value={method}]")
        press(chrome, Keys.SPACE)
    assert column(chrome, "t-digits", 1) == ["trades", "dynat"]
    assert column(chrome, "t-digits-AA", 1) == ["trades", "dynat"]
    compared = column(chrome, "t-Transferred-to-digits", 3)
    assert compared
    assert all("trades" in text or "dynat" in text for text in compared)
    left = texts(chrome, ".part tbody tr")
    assert texts(chrome, "#status") == [f"{len(left)} of {len(everything)} rows."]
    open_at(chrome, chrome.current_url)
    assert texts(chrome, ".part tbody tr") == left
    choose(chrome, "setting", "cifar100_wrn34_10")
    assert column(chrome, "t-Table-2-CIFAR-100-target-WRN-34-10", 1) == ["TRADES", "", "DYNAT", ""]
    assert texts(chrome, "#digits, #table1") == []
    chrome.find_element("id", "reset").click()
    assert texts(chrome, ".part tbody tr") == everything
    assert view(chrome) == ""


def test_an_address_with_what_the_page_does_not_have_shows_everything(page: Page) -> None:
    chrome, address = page
    everything = texts(chrome, ".part tbody tr")
    open_at(
        chrome, f"{address}#setting=x&method=y&pair=digits/x/y&sort=t-digits/99/ascending&sort=a/b/c&sort="
    )
    assert texts(chrome, ".part tbody tr") == everything
    assert texts(chrome, "#pair, [aria-sort]") == []


# ------------------------------------------------------------------------------------------ side by side


@pytest.mark.parametrize(("first", "second"), [("trades", "dynat"), ("dynat", "trades")])
def test_two_methods_lie_side_by_side_as_in_the_files(page: Page, first: str, second: str) -> None:
    chrome, _ = page
    choose(chrome, "first", first)
    assert texts(chrome, "#pair") == []
    choose(chrome, "second", second)
    assert texts(chrome, "#status")[0].endswith(f" {first} and {second} side by side.")
    with (ROOT / "metrics/tables/pairs.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if {row["first"], row["second"]} == {first, second}]
    cells = read_cells()
    found = chrome.execute_script(
        "return [...document.querySelectorAll('#pair tbody tr')].map((row) => [...row.cells].map("
        "(cell) => [cell.innerText.replace('\\n', ' '), cell.querySelector('a')?.hash]))"
    )
    assert len(found) == len(rows) > 1
    for (_, one, other, gap, *rest), row in zip(found, rows, strict=True):
        for (text, link), method in ((one, first), (other, second)):
            key = f"digits/{method}/0/{row['column']}"
            assert (text, link) == (cells[key]["text"], f"#a-{key.replace('/', '-')}")
        sign = 1 if row["first"] == first else -1
        low, high = sorted(sign * float(row[end]) for end in ("low", "high"))
        numbers = [float(each) for each in gap[0].replace("[", "").replace("]", "").replace(",", "").split()]
        assert numbers == pytest.approx([sign * float(row["difference"]), low, high], abs=0.051)
        shown = [float(text) for text, _ in rest]
        assert shown == pytest.approx([float(row["p"]), float(row["holm"]), float(row["n"])], rel=0.05)
    before = texts(chrome, "#pair td")
    open_at(chrome, chrome.current_url)
    assert texts(chrome, "#pair td") == before


# --------------------------------------------------------------------------------------------- by keyboard


def test_a_number_opens_its_sheet_and_escape_leads_back_to_it_and_to_the_view(page: Page) -> None:
    chrome, address = page
    open_at(chrome, address + "#" + (shown := "setting=digits&method=dynat&pair=digits%2Fdynat%2Ftrades"))
    in_pair = "#pair a[href='#a-digits-dynat-0-aa']"
    closing = ([Keys.ESCAPE], [Keys.TAB, Keys.ENTER])  # the link that closes is the first in the sheet
    for number, leave in product(("#n-digits-dynat-0-aa a", in_pair), closing):
        focus(chrome, number)
        press(chrome, Keys.ENTER)
        assert view(chrome) == "a-digits-dynat-0-aa"
        assert texts(chrome, ".audit strong") == [read_cells()["digits/dynat/0/aa"]["text"]]
        assert column(chrome, "t-digits", 1) == ["dynat"]
        press(chrome, *leave)
        assert texts(chrome, ".audit") == []
        assert view(chrome) == shown
        assert chrome.execute_script("return document.activeElement.matches(arguments[0])", number)


def test_tab_reaches_every_control_and_each_shows_its_focus(page: Page) -> None:
    chrome, address = page
    open_at(chrome, f"{address}#setting=digits&method=dynat&pair=digits/trades/dynat")
    shown = """const e = document.activeElement, box = e.getBoundingClientRect();
    const clear = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2).includes(e);
    const seen = getComputedStyle(e).outlineStyle !== "none" && box.bottom > 0 && box.top < innerHeight;
    return [e.id || e.value || e.textContent.trim(), seen && (clear || box.height > innerHeight)]"""
    reached = []
    chrome.execute_script("document.querySelector('details').open = true")
    for _ in range(60):
        press(chrome, Keys.TAB)
        reached.append(chrome.execute_script(shown))
    assert [name for name, seen in reached if not seen] == []
    names = [name for name, _ in reached]
    wanted = ["setting", "Methods: dynat", "trades", "reset", "pair-setting", "first", "second", "pair"]
    wanted += [read_cells()["digits/trades/0/clean"]["numbers"]["accuracy"]]
    assert [name for name in wanted if name not in names] == []


def test_a_screen_reader_finds_a_name_for_everything(page: Page) -> None:
    chrome, address = page
    open_at(chrome, f"{address}#pair=digits/trades/dynat&sort=t-digits/1/ascending")
    nodes = chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "link", "combobox", "region", "rowheader", "heading", "image"):
        assert all(named.get(role, ["x"])), role
    assert {"Setting", "First", "Second"} <= {*named["combobox"]}
    assert {"digits", "digits: PGD-20", "Two methods side by side"} <= {*named["region"]}
    assert len(named["columnheader"]) > 60
    assert "status" in named
