"""Races in the browser: one over a tiny model, and the recorded ones."""

import csv
import re

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from test_app import PHONE, drawer, sentence, tab

from peftlab.lectures.lessons import LESSONS
from peftlab.race import ranked


def board(page):
    return page.locator("table.board:visible tbody tr")


def test_four_race_and_are_found_again(tiny_app, open_page):
    page = open_page(tiny_app.url, PHONE)
    tab(page, "Race")
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=60_000)
    drawer(page)
    page.get_by_role("button", name="Race here").click()
    status = page.locator(".status:visible").first  # until the race begins, the recorded one's stands below
    expect(status).to_contain_text("Done. Run here, live.", timeout=120_000)
    racers = {row.locator(".racer b").inner_text() for row in board(page).all()}
    assert racers == {"LoRA", "IA³", "Houlsby adapter", "Prompt tuning"}
    expect(board(page)).to_contain_text([re.compile(r"\d+%.*\d+% to \d+%", re.S)] * 4)
    page.reload()  # the race is found again where it is
    tab(page, "Race")
    expect(status).to_contain_text("Done. Run here, live.")
    expect(board(page)).to_have_count(4)
    page.get_by_role("button", name="Show the recorded race").click()
    expect(board(page)).to_have_count(len(LESSONS["methods"].recordings()[0].lines))


def test_the_board_is_sorted_and_downloaded(app, open_page):
    page = open_page(app.url + "?tab=race")
    page.locator("[data-sort=forgetting]").click()
    order = [line.name for line in ranked(LESSONS["methods"].recordings()[0].lines, "forgetting")]
    expect(board(page).locator(".racer b")).to_have_text(order)
    expect(page).to_have_url(re.compile("sort=forgetting"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert [row["racer"] for row in csv.DictReader(download.value.path().read_text().splitlines())] == order


def test_a_lesson_asks_first_and_then_shows(app, open_page):
    page = open_page(app.url + "?tab=race", PHONE)
    lesson = LESSONS["rank"]
    drawer(page)
    page.get_by_role("radio", name="Rank", exact=True).click()
    drawer(page)
    expect(sentence(page)).to_contain_text("A guess first")
    expect(page.locator("table.board:visible")).to_have_count(0)
    page.get_by_role("radio", name=lesson.options[0]).click()
    expect(page.locator("table.board:visible")).to_have_count(1)
    expect(page.locator("table.checks:visible")).to_contain_text(lesson.statements[0].says)
    expect(page).to_have_url(re.compile("lesson=rank"))
    expect(page.locator(".figure:visible .main-svg").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
