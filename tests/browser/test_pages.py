"""Reports in a real browser: they fit, in light and dark, say nothing on the console, and their links are live."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dgr_jax.reports.words import points
from dgr_jax.statistics import paired_difference
from tests.study import made_up

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
WIDTHS, SCHEMES = (390, 1280, 1920), ("light", "dark")

CONTRASTS = """() => {
  const light = (rgb) => rgb.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const [r, g, b, a] = numbers(getComputedStyle(node).backgroundColor);
      if (a === undefined || a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("h1, h2, h3, p, th, td, li, a, summary, .verdict, dt, dd")]
    .filter((node) => node.textContent.trim() && node.offsetParent !== null)
    .map((node) => {
      const [a, b] = [numbers(getComputedStyle(node).color).slice(0, 3), behind(node)].map(light);
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${node.tagName} ${node.textContent.slice(0, 40)}`];
    });
}"""


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # here: `make test` collects this file without it

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=itertools.product(WIDTHS, SCHEMES), ids=lambda setting: f"{setting[0]} {setting[1]}")
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of some width in some scheme, that must say nothing on its console and ask for nothing outside."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else said.append(asked.url))
    yield opened
    opened.close()
    assert not said


def open_all(page: Page, file: pathlib.Path) -> None:
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")


def check(page: Page) -> None:
    """It fits, its pictures are there, and its text can be read."""
    room = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= room
    outside = (
        "(n) => !n.closest('.scroll') && n.getBoundingClientRect().right > document.documentElement.clientWidth + 1"
    )
    found = f"[...document.querySelectorAll('main *')].filter({outside}).map((n) => n.outerHTML.slice(0, 80))"
    assert page.evaluate(found) == []
    for shown in page.locator("img").all():
        shown.scroll_into_view_if_needed()
        box = shown.bounding_box()
        assert shown.evaluate("(image) => image.naturalWidth") > 0 and box is not None and 300 <= box["width"] <= room
        assert len(shown.get_attribute("alt") or "") > 5
    faint = [what for contrast, what in page.evaluate(CONTRASTS) if contrast < 4.5]
    assert faint == []


def test_the_report_of_a_study(page: Page, study_page: pathlib.Path):
    open_all(page, study_page)
    check(page)
    titles = page.locator("h2").all_text_contents()
    assert titles[:3] == ["Conclusions", "Reasoning against refusal", "All arms"]


def test_the_samples_of_an_arm(page: Page, study_page: pathlib.Path):
    open_all(page, next(iter(sorted(study_page.parent.glob("samples/*.html")))))
    check(page)
    assert "taken" not in page.title()


def test_the_report_on_shift(page: Page, shift_page: pathlib.Path):
    open_all(page, shift_page)
    check(page)
    assert page.locator("#traces article").count() > 0


@pytest.fixture
def wide(browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    yield opened
    opened.close()


def test_links_are_live(wide: Page, study_page: pathlib.Path):
    for file in (study_page, next(study_page.parent.glob("samples/*.html"))):
        open_all(wide, file)
        found = wide.locator("a").evaluate_all("(links) => links.map((link) => link.getAttribute('href'))")
        assert len(found) > 3
        for link in found:
            place, _, anchor = link.partition("#")
            if place.startswith("data:"):
                continue
            target = (file.parent / place).resolve() if place else file
            assert target.exists(), link
            assert not anchor or f'id="{anchor}"' in target.read_text(), link
    open_all(wide, study_page)
    wide.locator("a[href*='samples/']").first.click()
    assert "samples/" in wide.url and wide.locator("h3").count() > 0


def test_the_first_column_and_the_head_of_a_table_stay(wide: Page, study_page: pathlib.Path):
    open_all(wide, study_page)
    wide.set_viewport_size({"width": 390, "height": 700})
    table = wide.locator("#all_arms .scroll")
    first, head = table.locator("tbody tr th").nth(3), table.locator("thead th").nth(1)
    before = first.bounding_box(), head.bounding_box()
    table.evaluate("(part) => { part.scrollLeft = 250; }")
    left = first.bounding_box()
    assert left is not None and before[0] is not None and left["x"] == pytest.approx(before[0]["x"])
    table.evaluate("(part) => { part.scrollTop = 900; }")
    top = head.bounding_box()
    assert top is not None and before[1] is not None and top["y"] == pytest.approx(before[1]["y"])


def test_two_arms_are_compared_as_python_compares_them(wide: Page, study_page: pathlib.Path):
    open_all(wide, study_page)
    results = made_up.study()
    options = wide.locator("#arm-a option").all_text_contents()
    for a, b in ((0, 1), (3, 40), (5, 5)):
        wide.select_option("#arm-a", str(a))
        wide.select_option("#arm-b", str(b))
        shown = [row.locator("td, th").all_text_contents() for row in wide.locator("#compared tr").all()]
        for (rate, *_), cells in zip(
            (("reasoning_accuracy",), ("refusal_rate",), ("over_refusal_rate",)), shown, strict=True
        ):
            sides = [_mean_of(results, options[number], rate) for number in (a, b)]
            found = paired_difference(*[list(side.values()) for side in sides])
            assert cells[1] == f"{points(found.value)} [{points(found.low)}, {points(found.high)}]"
            assert cells[4:6] == [f"{found.up}", f"{found.down}"]
            assert cells[2] == f"{np.mean(list(sides[0].values())):.2f}"


def _mean_of(results: dict, title: str, rate: str) -> dict[str, float]:
    """Each prompt's rate of the arm with this title, over its seeds."""
    words = re.split(", ", title)
    if words[-1] == "before alignment":
        runs = [run for run in results["runs"] if run["kind"] == "base" and run["model"] == words[0]]
    else:
        model, source, kind, *parts, learning_rate = words
        runs = [
            run
            for run in results["runs"]
            if (run["model"], run["kind"]) == (model, kind)
            and run["source"] == source
            and f"lr {run['learning_rate']:g}" == learning_rate
            and bool(run["rows"]) == bool(parts)
        ]
    assert runs
    return {id: float(np.mean([run[rate]["per_item"][id] for run in runs])) for id in runs[0][rate]["per_item"]}


def test_a_page_can_be_printed(wide: Page, study_page: pathlib.Path):
    wide.goto(study_page.as_uri())
    wide.emulate_media(media="print")
    assert wide.locator("nav").is_hidden()
