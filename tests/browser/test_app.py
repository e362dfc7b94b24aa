"""Each tab used as a person would, at desktop and phone width."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("playwright")
from conftest import App
from playwright.sync_api import Page, expect

from peftlab.catalog import PRESETS
from peftlab.methods import METHODS

PHONE = (390, 844)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def sentence(page: Page):
    return page.locator(".sentence:visible")


def drawer(page: Page) -> None:
    """On a phone the settings are in a drawer; on a desktop this does nothing."""
    handle = page.locator(".handle:visible")
    if handle.count():
        handle.click()
        page.wait_for_timeout(400)


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option, exact=True).click()


def methods(page: Page):
    return page.locator(".chooser:visible select")


def number(page: Page, label: str):
    return page.get_by_label(f"number input for {label}", exact=True).locator("visible=true")


def test_page_answers_fast_and_calculates_while_the_model_is_fetched(chromium, open_page, tmp_path):
    """Fast beside a page with nothing on it: how many seconds that is depends on the processor."""
    bare = tmp_path / "bare.py"
    bare.write_text("import gradio as gr\nwith gr.Blocks() as demo:\n    gr.HTML('nothing')\ndemo.launch()\n")
    nothing = App(None, tmp_path, bare)
    nothing.end()
    app = App(str(tmp_path / "empty"), tmp_path)
    try:
        assert app.seconds_to_answer < 2.5 * nothing.seconds_to_answer
        page = open_page(app.url)
        expect(page.locator(".chip")).to_contain_text(re.compile("looking|downloading|verifying|converting"))
        choose(page, "Model", "Llama 2 7B")
        expect(sentence(page)).to_contain_text(re.compile(r"Llama 2 7B needs (about )?1\d\d GB"))
        tab(page, "LoRA")
        expect(sentence(page)).to_contain_text("of 6,738,415,616")
        expect(page.locator(".chip")).not_to_contain_text("is ready")
        page.close()
    finally:
        app.end()


def test_memory_reproduces_the_lectures_in_one_click(app, open_page):
    page = open_page(app.url, PHONE)
    expect(sentence(page)).to_contain_text(re.compile(r"^Full fine-tuning of Llama 3\.1 8B needs 1\d\d GB"))
    page.get_by_role("button", name="100B (KIIT tutorial)").click()
    expect(sentence(page)).to_contain_text("needs 800 GB")
    page.get_by_role("button", name="Gemma 3 270M (lecture 11.2)").click()
    expect(sentence(page)).to_contain_text("Gemma 3 270M needs 3.22 GB")
    drawer(page)
    expect(methods(page).locator("option[value=bitfit]")).to_be_disabled()
    page.get_by_text("Methods not for this model").locator("visible=true").click()
    expect(page.locator(".note details:visible")).to_contain_text("method=bitfit: Gemma 3 270M has no bias to train")
    methods(page).select_option("full")
    expect(sentence(page)).to_have_text(re.compile(r"Gemma 3 270M needs 3\.22 GB\. These alone fit"))


TRACED = "document.querySelector('.source')?.innerText.includes('traced step')"
DRAG = """async () => {
  const range = [...document.querySelectorAll('input[type=range]')].find((e) => e.getAttribute('aria-label').includes('Batch'));
  const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;
  const bars = () => document.querySelector('.bars').innerHTML, times = [];
  for (let batch = 1; batch <= 32; batch++) {
    const before = bars(), start = performance.now();
    set.call(range, batch);
    range.dispatchEvent(new Event('input', {bubbles: true}));
    while (bars() === before && performance.now() - start < 2000) await new Promise((done) => setTimeout(done, 1));
    times.push(performance.now() - start);
  }
  return times;
}"""


def test_bars_follow_a_dragged_batch_at_once_and_the_exact_figure_follows(app, open_page):
    page = open_page(app.url)
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=300_000)  # until then the page asks how far it is
    page.wait_for_function(TRACED, timeout=60_000)
    sent = []
    page.on("request", lambda request: sent.append(request.url) if "component_server" in request.url else None)
    times = sorted(page.evaluate(DRAG))
    assert not sent, "a slider that moves must not ask the server"
    assert times[len(times) // 2] < 50 and times[-2] < 150
    dragged = sentence(page).inner_text()
    expect(page.locator(".source:visible")).to_contain_text("from the closed form")
    page.wait_for_function(TRACED, timeout=60_000)
    assert sentence(page).inner_text() != dragged  # the exact figure is another one
    expect(sentence(page)).to_contain_text("Llama 3.1 8B")
    page.wait_for_url(re.compile("batch_size=32"))


def test_a_model_of_ones_own_and_ones_that_cannot_be(app, open_page, config_files):
    page = open_page(app.url)
    model = page.get_by_label("Model", exact=True).locator("visible=true")
    model.fill("nosuch-model")
    model.press("Enter")
    expect(page.locator(".problem:visible")).to_contain_text("no such model")
    expect(sentence(page)).to_contain_text("Llama 3.1 8B")
    page.get_by_text("Your own config.json").locator("visible=true").click()
    box = page.get_by_label("Paste it").locator("visible=true")
    box.fill('{"model_type": "llama", "hidden_size": ')
    page.get_by_role("button", name="Use it").click()
    expect(page.locator(".problem:visible", has_text="not JSON")).to_be_visible()
    box.fill(Path(config_files["llama"]).read_text())
    page.get_by_role("button", name="Use it").click()
    page.wait_for_url(re.compile("model=config"))
    page.reload()
    expect(sentence(page)).not_to_contain_text("Llama 3.1 8B")
    expect(page.locator(".problem:visible")).to_have_count(0)


def test_charts_are_drawn_in_the_readers_theme(app, open_page):
    for theme, colour in (("light", "rgb(0, 114, 178)"), ("dark", "rgb(86, 180, 233)")):
        page = open_page(app.url + f"?__theme={theme}", theme=theme)
        page.wait_for_selector(".js-plotly-plot path.js-fill")
        fills = "[...document.querySelectorAll('.js-plotly-plot path.js-fill')].map(e => getComputedStyle(e).fill)"
        assert colour in page.evaluate(fills)


def test_every_method_is_offered_with_its_own_settings(app, open_page):
    page = open_page(app.url + "?tab=live", PHONE)
    panel, rank = page.locator(".method:visible"), number(page, "Rank")
    expect(panel).to_contain_text("LoRA")
    drawer(page)
    expect(methods(page).locator("option")).to_have_count(len(METHODS))
    methods(page).select_option("houlsby")
    expect(number(page, "Bottleneck")).to_have_value("16")
    expect(rank).to_have_count(0)
    expect(panel).to_contain_text("Houlsby et al. (2019)")
    expect(panel.get_by_role("img", name=re.compile("Houlsby adapter: sub-layer → trained down"))).to_have_count(1)
    methods(page).select_option("vera")
    expect(rank).to_have_value("256")
    page.wait_for_url(re.compile("method=vera"))
    page.locator(".controls:visible").get_by_text("More settings").click()
    choose(page, "Model", "GPT-2")
    expect(methods(page).locator("option[value=bitfit]")).to_be_enabled()
    expect(methods(page).locator("option[value=oft]")).to_be_disabled()
    choose(page, "Preset", "QLoRA, 270M to 7B")
    expect(methods(page)).to_have_value("qlora")
    expect(rank).to_have_value("64")
    page.wait_for_url(re.compile("method=qlora.*learning_rate=0.0002"))
    choose(page, "Preset", PRESETS["alpha-r"].name)
    page.locator("#live-steps").locator("input, textarea").fill("77")  # before the answer; both stay
    page.wait_for_url(re.compile("(?=.*alpha=)(?=.*preset=alpha-r).*steps=77"))


def test_train_stop_train_and_compare(app, open_page):
    page = open_page(app.url + "?tab=live&task=intent&steps=30")  # the task of the shortest answers
    expect(sentence(page)).to_contain_text("Accuracy: 0% →")
    page.get_by_role("button", name="Train", exact=True).dblclick()
    expect(page.get_by_role("button", name="Training")).to_be_disabled()
    expect(page.locator(".problem:visible")).to_have_count(0)
    expect(page.locator("#live-bar")).to_contain_text(re.compile("step [2-9] of 30"), timeout=120_000)
    back = page.context.new_page()  # a second look at the run, as after a closed tab
    back.goto(page.url)
    expect(back.locator("#live-bar")).to_contain_text(re.compile(r"step \d+ of 30"), timeout=20_000)
    page.get_by_role("button", name="Stop and keep").click()
    expect(page.locator("#live-bar")).to_contain_text("Stopped early; what it learned is kept", timeout=120_000)
    expect(sentence(page)).to_contain_text("on items it has never seen")
    expect(page.get_by_role("button", name="Download adapter")).to_be_visible()
    tab(page, "Compare")
    mine = page.get_by_label("Adapter", exact=True).locator("visible=true")
    expect(mine).to_have_value(re.compile("^yours: intent-lora-"))
    expect(sentence(page)).to_contain_text("of 40, loses")


def test_compare_streams_both(app, open_page):
    page = open_page(app.url + "?tab=compare", PHONE)
    expect(sentence(page)).to_contain_text("The adapter wins")
    base, adapted = page.locator(".pane.base textarea"), page.locator(".pane.adapted textarea")
    assert json.loads(adapted.input_value())["name"]
    prompt = page.get_by_label("Prompt", exact=True).locator("visible=true")
    prompt.fill("Good day, the garden hose I paid for leaks at the tap end. Regards, Ingrid Solberg")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator(".note:visible", has_text="just now")).to_be_visible(timeout=120_000)
    assert "Ingrid Solberg" in json.loads(adapted.input_value())["name"]
    assert base.input_value() != adapted.input_value()


def test_nothing_is_wider_than_a_phone_whose_drawer_holds_the_controls(app, open_page):
    page = open_page(app.url, PHONE)
    model = page.get_by_label("Model", exact=True).first
    expect(model).not_to_be_in_viewport()
    drawer(page)
    expect(model).to_be_in_viewport(ratio=1)
    drawer(page)
    expect(model).not_to_be_in_viewport()
    for name in ("Memory", "LoRA", "Live", "Compare"):
        tab(page, name)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert sentence(page).bounding_box()["width"] <= 390
        for part in page.locator(".figure:visible, .run-row:visible, .panes:visible, .wide:visible").all():
            box = part.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, (name, box)
