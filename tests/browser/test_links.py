"""The address is the settings: Back, Forward, reload and links, also inside another site's frame."""

import re

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from test_app import PHONE, sentence, tab

RANK = "#memory-rank input[type=number]"


def test_back_undoes_the_last_change_and_forward_does_it_again(app, open_page):
    page = open_page(app.url)
    rank, batch = page.locator(RANK), page.locator("#memory-batch_size input[type=number]")
    rank.fill("32")
    page.wait_for_url("**/?rank=32")
    batch.fill("8")
    page.wait_for_url("**/?rank=32&batch_size=8")
    tab(page, "LoRA")
    expect(sentence(page)).to_contain_text("Rank 32")
    for _ in range(2):
        page.go_back()
    expect(page.get_by_role("tab", name="Memory")).to_have_attribute("aria-selected", "true")
    expect(batch).to_have_value("4")
    expect(rank).to_have_value("32")
    page.go_back()
    expect(rank).to_have_value("8")
    expect(sentence(page)).to_contain_text("LoRA, rank 8")
    for _ in range(3):
        page.go_forward()
    expect(sentence(page)).to_contain_text("Rank 32")
    tab(page, "Memory")
    expect(batch).to_have_value("8")


def test_a_reload_at_any_moment_gives_the_same_page(app, open_page):
    page = open_page(app.url)
    page.locator(RANK).fill("48")
    page.wait_for_url("**/?rank=48")  # before the answer
    page.reload()
    expect(page.locator(RANK)).to_have_value("48")
    expect(sentence(page)).to_contain_text("LoRA, rank 48")
    page.get_by_role("button", name="100B (KIIT tutorial)").click()
    page.wait_for_url(re.compile("model=100B.*convention=8n"))
    page.reload()
    expect(sentence(page)).to_contain_text("needs 800 GB")
    expect(page.locator("#memory-timeline")).to_have_count(0)  # a number has no step


def test_links_work_inside_a_frame(app, chromium):
    """As Spaces show an app: the address that people see is that of another site, which is told by a message."""
    site = (
        f"<script>window.told = []; onmessage = (e) => told.push(e.data)</script>"
        f'<iframe src="{app.url}?rank=12" width=1400 height=880></iframe>'
    )
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.goto(app.url.replace("127.0.0.1", "localhost") + "config")  # another site to a browser
    page.set_content(site)
    inside = page.frame_locator("iframe")
    expect(inside.locator(RANK)).to_have_value("12")
    expect(inside.locator(".sentence:visible")).to_contain_text("LoRA, rank 12")
    inside.locator(RANK).fill("20")
    expect(inside.locator(".sentence:visible")).to_contain_text("LoRA, rank 20")
    page.wait_for_function("told.some((t) => t.queryString === 'rank=20')")
    inside.get_by_role("tab", name="LoRA", exact=True).click()
    page.wait_for_function("told.some((t) => t.queryString === 'rank=20&tab=lora')")
    page.close()


def test_a_word_of_the_trade_says_what_it_means(app, open_page):
    page = open_page(app.url, PHONE)
    word = page.locator(".term:visible").first
    word.click()  # a tap
    expect(word.locator(".tip")).to_be_visible()
    box = word.locator(".tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_a_refused_number_is_not_drawn_and_its_refusal_stands_beside_it(app, open_page):
    page = open_page(app.url)
    rank = page.locator(RANK)
    for typed in ("8.5", "-3", "1000000000", "9" * 20):
        rank.fill(typed)
        rank.press("Tab")
        says = re.compile(f"rank={float(typed):.0f}.*(must be|is a whole)")
        expect(page.locator("#memory-rank .refusal")).to_contain_text(says)
        expect(sentence(page)).to_contain_text("LoRA, rank 8 needs")
        assert float(rank.input_value()) == float(typed) or len(typed) > 16
    rank.fill("12")
    expect(page.locator(".refusal")).to_have_count(0)
    expect(sentence(page)).to_contain_text("LoRA, rank 12")


def test_back_undoes_what_is_typed_in_a_box_that_still_has_the_cursor(app, open_page):
    """And what is pasted or taken away is heard; Gradio's text box tells of letters that are typed, and of nothing else."""
    page = open_page(app.url + "?tab=live")
    steps = page.locator("#live-steps").locator("input, textarea")
    steps.click()
    page.keyboard.type("33")
    page.wait_for_url("**/?steps=33&tab=live")
    page.evaluate("history.back()")
    expect(steps).to_have_value("")
    steps.fill("78")  # as a paste does it, without a key
    page.wait_for_url("**/?steps=78&tab=live")
    page.evaluate("peftlab.write({steps: '12'})")
    page.locator("#live-sentence").click()
    expect(steps).to_have_value("12")
    steps.fill("")
    page.wait_for_url("**/?tab=live")


def test_racers_are_added_and_taken_away_by_keys(app, open_page):
    page = open_page(app.url + "?tab=race&lesson=rank")
    box = page.locator("#race-values input").last
    box.click()
    page.keyboard.press("Backspace")
    page.wait_for_url(re.compile("values="))
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"values=.*12"))
    page.keyboard.type("abc")
    page.keyboard.press("Enter")
    expect(page.locator(".problem:visible")).to_contain_text("abc")
