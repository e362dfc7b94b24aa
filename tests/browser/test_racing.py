"""A race in the browser, over a tiny model: four start, one is broken, three finish."""

import csv
import re

import pytest

pytest.importorskip("playwright")
from conftest import ROOT, App
from playwright.sync_api import expect
from test_app import drawer, sentence, tab

from peftlab.lectures.lessons import LESSONS
from peftlab.race import COLUMNS, ranked


@pytest.fixture(scope="module")
def tiny_app(chromium, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    running = App(None, folder, ROOT / "tests" / "browser" / "tiny_app.py", str(folder))
    yield running
    running.end()


def board(page):
    return page.locator("table.board:visible tbody tr")


def test_four_race_and_the_broken_one_says_why(tiny_app, open_page, size):
    page = open_page(tiny_app.url, size)
    tab(page, "Race")
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=60_000)
    drawer(page)
    page.get_by_role("button", name="Race here").click()
    expect(page.locator(".status:visible")).to_contain_text("Done. Run here, live.", timeout=120_000)
    rows = {row.locator(".racer b").inner_text(): row for row in board(page).all()}
    assert set(rows) == {"LoRA", "IA³", "Houlsby adapter", "Prompt tuning"}
    for name, row in rows.items():
        if name == "IA³":
            expect(row).to_contain_text(re.compile("nan at step 1: training diverged"))
        else:
            expect(row).to_contain_text(re.compile(r"\d+%.*\d+% to \d+%", re.S))
    assert board(page).last.locator(".racer b").inner_text() == "IA³"
    expect(sentence(page)).to_contain_text("Of 4 racers (1 ended early)")
    page.reload()  # the race is found again where it is
    tab(page, "Race")
    expect(page.locator(".status:visible")).to_contain_text("Done. Run here, live.")
    expect(board(page)).to_have_count(4)
    page.get_by_role("button", name="Show the recorded race").click()
    expect(board(page)).to_have_count(len(LESSONS["methods"].recordings()[0].lines))


def test_sorting_csv_and_link_go_round(app, open_page, size):
    page = open_page(app.url + "?tab=race", size)
    lines = LESSONS["methods"].recordings()[0].lines
    shown = lambda: [row.inner_text() for row in board(page).locator(".racer b").all()]  # noqa: E731
    expect(board(page)).to_have_count(len(lines))
    assert shown() == [line.name for line in ranked(lines)]
    page.locator("[data-sort=forgetting]").click()
    first = ranked(lines, "forgetting")[0].name
    expect(board(page).first.locator(".racer b")).to_have_text(first)
    assert shown() == [line.name for line in ranked(lines, "forgetting")]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    with open(download.value.path()) as file:
        rows = list(csv.DictReader(file))
    assert [row["racer"] for row in rows] == shown()
    title = next(f"{c.title} ({c.unit})" for c in COLUMNS if c.key == "forgetting")
    assert float(rows[0][title]) == pytest.approx(
        sum(ranked(lines, "forgetting")[0].forgetting) / len(ranked(lines, "forgetting")[0].forgetting)
    )
    expect(page).to_have_url(re.compile("sort=forgetting"))
    other = open_page(page.url, size)
    expect(other.get_by_role("tab", name="Race", exact=True)).to_have_attribute("aria-selected", "true")
    expect(other.locator("table.board:visible tbody tr").first.locator(".racer b")).to_have_text(first)


def test_a_lesson_asks_first_and_then_shows(app, open_page, size):
    page = open_page(app.url + "?tab=race", size)
    lesson = LESSONS["rank"]
    drawer(page)
    page.get_by_role("radio", name="Rank", exact=True).click()
    drawer(page)
    expect(page.locator("table.board:visible")).to_have_count(0)
    expect(sentence(page)).to_contain_text("A guess first")
    page.get_by_role("radio", name=lesson.options[0]).click()
    expect(page.locator("table.board:visible")).to_have_count(1)
    expect(page.locator("table.checks:visible")).to_contain_text(lesson.statements[0].says)
    expect(page).to_have_url(re.compile("lesson=rank"))
    drawn = page.locator(".figure:visible .main-svg")
    expect(drawn.first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_a_link_opens_the_lesson_with_its_result(app, open_page):
    page = open_page(app.url + "?tab=race&lesson=modules&values=query,value;all-linear&seeds=2")
    expect(page.locator("table.board:visible tbody tr")).to_have_count(len(LESSONS["modules"].recordings()[0].lines))
    expect(page.get_by_role("radio", name="Target modules")).to_be_checked()
    page = open_page(app.url + "?tab=race&lesson=nonsense")
    expect(page.locator("#race-lesson .refusal")).to_contain_text("lesson=nonsense")
