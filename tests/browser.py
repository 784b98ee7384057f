"""A real Chromium: windows, colour schemes, what is drawn in them; contrast by the formula of WCAG."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

SWITCHES = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
TEXTS = """
const drawn = (element) => element.checkVisibility({visibilityProperty: true, opacityProperty: true});
const grounds = (element) =>
  element ? [getComputedStyle(element).backgroundColor, ...grounds(element.parentElement)] : [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.data.trim() || !drawn(element) || element.closest("script, style")) continue;
  const ink = element.closest("svg") ? style.fill : style.color;
  found.push([walker.currentNode.data.trim().slice(0, 40), ink, grounds(element)]);
}
return found;
"""
OUTSIDE = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && !element.parentElement.closest(".scroll") && (box.right > width + 1 || box.left < -1);
}).map((element) => element.outerHTML.slice(0, 120));
"""
Colour = tuple[float, float, float, float]


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Debian's Chromium without a window; the test is skipped where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium with its driver; apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = browser
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def resize(chrome: Chrome, width: int, scheme: str = "light") -> None:
    """A window of this width in CSS pixels, ``light`` or ``dark``."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def outside(chrome: Chrome) -> list[str]:
    """What runs out of the window and is in no box that scrolls."""
    found: list[str] = chrome.execute_script(OUTSIDE)
    wider = chrome.execute_script("return document.documentElement.scrollWidth > innerWidth")
    return found + ["the page scrolls sideways"] * wider


def contrasts(chrome: Chrome) -> list[tuple[str, float]]:
    """Every text that is drawn, with the ratio of its colour to what lies under it."""
    texts: list[Any] = chrome.execute_script(TEXTS)
    found = []
    for text, ink, grounds in texts:
        under: Colour = (255, 255, 255, 1)
        for ground in reversed(grounds):
            under = over(colour(ground), under)
        found.append((text, ratio(over(colour(ink), under), under)))
    return found


def colour(text: str) -> Colour:
    """``rgb(1, 2, 3)`` or ``rgba(1, 2, 3, 0.5)``."""
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", text))
    return red, green, blue, alpha[0] if alpha else 1.0


def over(top: Colour, under: Colour) -> Colour:
    """A colour on an opaque one."""
    red, green, blue = (top[3] * a + (1 - top[3]) * b for a, b in zip(top[:3], under[:3], strict=True))
    return red, green, blue, 1.0


def ratio(one: Colour, other: Colour) -> float:
    """WCAG 2.2's contrast ratio, from 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(of: Colour) -> float:
    """WCAG 2.2's relative luminance, from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in of[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
