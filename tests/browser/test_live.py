"""A run over a tiny model as one watches it: nothing jumps, its link is copied, and its card leads on."""

import re

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from test_app import PHONE, sentence

BELOW = ("loss", "metric", "figures", "card", "said")
TOPS = "(names) => names.map((n) => Math.round(document.getElementById('live-' + n).getBoundingClientRect().top + scrollY))"


def train(page):
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=60_000)
    page.get_by_role("button", name="Train", exact=True).click()


def ended(page):
    expect(page.locator("#live-bar")).to_contain_text("in all.", timeout=60_000)
    expect(page.locator("#live-keep")).to_be_visible()


@pytest.mark.parametrize("size", [(1440, 900), PHONE])
def test_nothing_moves_while_a_run_goes_on(tiny_app, open_page, size):
    page = open_page(tiny_app.url + "?tab=live&steps=60", size)
    expect(page.locator("#live-figures *")).not_to_have_count(0)
    below = BELOW[:4] if size == PHONE else BELOW  # the card of a phone grows with its advice
    before = page.evaluate(TOPS, below)
    train(page)
    expect(page.locator("#live-bar")).to_contain_text(re.compile(r"step \d+ of 60"), timeout=60_000)
    seen = set()
    while "in all." not in page.locator("#live-bar").inner_text():
        seen.add(tuple(page.evaluate(TOPS, below)))
        page.wait_for_timeout(100)
    ended(page)
    assert len(seen) == 1, seen
    (while_it_ran,) = seen
    assert page.evaluate(TOPS, BELOW[:4]) == list(while_it_ran[:4])
    assert size == PHONE or list(while_it_ran) == before
    for button in page.locator("#live-go, #live-stop, #live-keep, #live-share button").all():
        inside = button.evaluate(
            "(b) => { const r = document.createRange(); r.selectNodeContents(b); return r.getBoundingClientRect().toJSON(); }"
        )
        box = button.bounding_box()
        assert inside["left"] >= box["x"] + 4 and inside["right"] <= box["x"] + box["width"] - 4, button.inner_text()


def test_a_runs_link_is_copied_with_and_without_permission_and_leads_there(tiny_app, open_page):
    page = open_page(tiny_app.url + "?tab=live&steps=20")
    train(page)
    ended(page)
    button = page.locator("#live-share button")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button.click()
    expect(button).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch(re.escape(tiny_app.url) + r"\?tab=live&run=[\w-]+", link)
    page.context.clear_permissions()
    expect(button).to_have_text("Copy link to this run")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    button.click()
    expect(button).to_have_text("Copied")
    expect(button).to_have_text("Copy link to this run")
    page.evaluate("document.execCommand = () => false")
    button.click()
    expect(page.locator("#live-share input")).to_have_value(link)
    other = page.context.browser.new_context().new_page()
    other.goto(link)
    expect(other.locator("#live-bar")).to_contain_text("step 20 of 20")
    expect(other.locator("#live-card")).to_contain_text("What to try next")
    expect(other.locator("#live-card [data-opens]")).to_have_count(0)  # the adapter is its owner's
    other.context.close()


def test_the_card_sets_the_next_run_and_opens_the_comparison(tiny_app, open_page):
    page = open_page(tiny_app.url + "?tab=live&steps=20")
    train(page)
    ended(page)
    page.locator("#live-card [data-replace]").first.click()
    expect(page.locator("#live-bar")).to_contain_text("Your next run, as set here")
    page.locator("#live-card [data-opens]").click()
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(sentence(page)).to_contain_text("The adapter wins")
    expect(page.get_by_label("Adapter", exact=True).locator("visible=true")).to_have_value(re.compile("^yours"))


def test_a_late_second_press_begins_nothing_and_a_second_window_keeps_up(tiny_app, open_page):
    page = open_page(tiny_app.url + "?tab=live&steps=2000")
    window = page.context.new_page()
    window.goto(page.url)
    expect(window.get_by_role("button", name="Train", exact=True)).to_be_enabled()
    train(page)
    button = page.get_by_role("button", name="Training")
    expect(button).to_be_disabled()
    expect(page.locator("#live-bar")).to_contain_text(re.compile(r"step \d+ of 2000"), timeout=60_000)
    expect(window.get_by_role("button", name="Training")).to_be_disabled()
    button.evaluate("(button) => { button.disabled = false; button.click(); }")
    page.wait_for_timeout(2000)
    expect(button).to_be_disabled()
    expect(page.locator(".problem:visible")).to_have_count(0)
    window.get_by_role("button", name="Stop and keep").click()
    ended(page)
    ended(window)
