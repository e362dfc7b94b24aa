"""How the figures and answers of a run stand on a phone: apart, inside the margins, with one rule below each row."""

from itertools import pairwise

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from test_app import PHONE

from peftlab.data import tasks

WORDS = """(elements) => elements.filter((one) => one.offsetParent).map((one) => {
  const words = document.createRange();
  words.selectNodeContents(one);
  return words.getBoundingClientRect().toJSON();
})"""
"""The boxes of the words in elements that are seen."""


def words(page, selector):
    return page.locator(selector).evaluate_all(WORDS)


def opened(tiny_app, open_page, task, size):
    page = open_page(f"{tiny_app.url}?tab=live&task={task}", size)
    expect(page.locator("#live-said")).to_contain_text(tasks.TASKS[task].heldout[0].prompt)
    return page


def test_a_phone_has_its_figures_and_the_names_of_its_tabs_apart(tiny_app, open_page):
    page = opened(tiny_app, open_page, "voice", PHONE)
    names = sorted(words(page, "[role=tab]"), key=lambda box: box["left"])
    assert len(names) == 6 and names[-1]["right"] <= PHONE[0]
    assert all(after["left"] - before["right"] >= 8 for before, after in pairwise(names))
    for tile in page.locator(".run-figures > div").all():
        box = tile.bounding_box()
        for text in tile.locator("dt .term, dd").evaluate_all(WORDS):
            assert text["right"] <= box["x"] + box["width"] <= PHONE[0] - 14


def test_a_phones_answers_have_one_rule_below_each_row_and_a_header_of_two_lines(tiny_app, open_page):
    page = opened(tiny_app, open_page, "voice", PHONE)
    first, *others = words(page, ".answers.kept th")
    assert first["height"] < 30 and len({box["top"] for box in others}) == 1
    rules = "(row) => [row, ...row.children].filter((one) => getComputedStyle(one).borderBottomWidth !== '0px').length"
    assert [row.evaluate(rules) for row in page.locator(".answers.kept tr").all()] == [1] * 4


def test_rows_of_short_answers_are_low_and_those_of_long_ones_high(tiny_app, open_page):
    cells = opened(tiny_app, open_page, "intent", (1440, 900)).locator(".answers.kept td > div")
    assert cells.first.bounding_box()["height"] <= 72
    over = cells.evaluate_all("(cells) => cells.map((one) => one.scrollHeight - one.clientHeight)")
    assert max(over) <= 1  # a rounding: none has to be scrolled
    cells = opened(tiny_app, open_page, "voice", (1440, 900)).locator(".answers.kept td > div")
    assert cells.first.bounding_box()["height"] >= 130
