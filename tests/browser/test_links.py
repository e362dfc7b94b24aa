"""The address is the settings: Back, Forward, reload and links, also inside another site's frame."""

import http.server
import re
import threading
from functools import partial

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from test_app import sentence, tab

from peftlab.catalog import PRESETS

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
    expect(sentence(page)).to_contain_text("needs 800 GB")
    page.reload()
    expect(sentence(page)).to_contain_text("needs 800 GB")
    expect(page.locator("#memory-timeline")).to_have_count(0)  # a number has no step


def test_a_slider_that_moves_asks_nobody_until_it_rests(app, open_page):
    page = open_page(app.url)
    sent = []
    page.on("request", lambda request: sent.append(request.url) if "component_server" in request.url else None)
    slider = page.locator("#memory-batch_size input[type=range]")
    slider.focus()
    for _ in range(15):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(50)
    assert not sent
    page.wait_for_url("**/?batch_size=19")
    page.wait_for_timeout(500)
    assert sent


def test_what_is_pasted_or_taken_away_is_heard(app, open_page):
    """Gradio's text box tells of letters that are typed, and of nothing else."""
    page = open_page(app.url + "?tab=live")
    steps = page.locator("#live-steps").locator("input, textarea")
    steps.fill("7")  # as a paste does it, without a key
    page.wait_for_url("**/?steps=7&tab=live")
    steps.fill("")
    page.wait_for_url("**/?tab=live")


@pytest.fixture
def elsewhere(tmp_path):
    """Another site, which shows a page in a frame."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://localhost:{server.server_port}/"
    server.shutdown()


def test_links_work_inside_a_frame(app, chromium, elsewhere):
    """As Spaces show an app: the address that people see is the frame's parent's, which is told by a message."""
    folder, url = elsewhere
    (folder / "index.html").write_text(
        f"<script>window.told = []; onmessage = (e) => told.push(e.data)</script>"
        f'<iframe src="{app.url}?rank=12" width=1400 height=880></iframe>'
    )
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.goto(url)
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
    page = open_page(app.url, (390, 844))
    word = page.locator(".term:visible").first
    word.click()  # a tap
    expect(word.locator(".tip")).to_be_visible()
    box = word.locator(".tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


@pytest.mark.parametrize("typed", ["8.5", "-3", "1000000000", "9" * 20])
def test_a_refused_number_is_not_drawn_and_its_refusal_stands_beside_it(app, open_page, typed):
    page = open_page(app.url)
    rank = page.locator(RANK)
    rank.fill(typed)
    rank.press("Tab")
    expect(page.locator("#memory-rank .refusal")).to_contain_text(re.compile("rank=.*(must be at|is a whole number)"))
    expect(sentence(page)).to_contain_text("LoRA, rank 8 needs")
    if len(typed) < 16:
        assert float(rank.input_value()) == float(typed)
    rank.fill("12")
    expect(page.locator(".refusal")).to_have_count(0)
    expect(sentence(page)).to_contain_text("LoRA, rank 12")


def test_back_undoes_what_is_typed_in_a_box_that_still_has_the_cursor(app, open_page):
    page = open_page(app.url + "?tab=live")
    steps = page.locator("#live-steps").locator("input, textarea")
    steps.click()
    page.keyboard.type("33")
    page.wait_for_url("**/?steps=33&tab=live")
    page.evaluate("history.back()")
    expect(steps).to_have_value("")
    steps.fill("78")
    page.wait_for_url("**/?steps=78&tab=live")
    page.evaluate("peftlab.write({steps: '12'})")
    page.locator("#live-sentence").click()
    expect(steps).to_have_value("12")


def test_a_preset_and_what_is_set_right_after_it_both_stay(app, open_page):
    page = open_page(app.url + "?tab=live")
    page.locator(".controls:visible").get_by_text("More settings").click()
    page.get_by_label("Preset", exact=True).locator("visible=true").click()
    page.get_by_role("option", name=PRESETS["alpha-r"].name).locator("visible=true").click()
    page.locator("#live-steps").locator("input, textarea").fill("77")
    page.wait_for_url(re.compile("alpha=.*preset=|preset=.*alpha="))
    page.wait_for_url(re.compile("steps=77"))
    expect(page.locator("#live-alpha").locator("input, textarea")).not_to_have_value("")


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
