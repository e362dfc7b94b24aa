"""The LoRA tab, which the page counts and draws alone: how fast, with which keys, and what it says of bad input."""

import re

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import Page, expect
from test_app import PHONE, sentence

KNOB = "[data-knob={}][type={}]:visible"
BUDGET = 50
"""Milliseconds from a move to the end of the frame that shows it."""
SLOWEST = 260
"""Milliseconds that WORK takes on the slowest phone that the budget is for: an AMD EPYC of 2.4 GHz, throttled six times."""
WORK = """() => {
  const place = document.createElement('div'), times = [];
  document.body.append(place);
  for (let round = 0; round < 12; round++) {
    const start = performance.now();
    place.innerHTML = Array.from({length: 400}, (_, i) => `<p><b>${(i * round).toLocaleString('en-US')}</b> of ${i}</p>`).join('');
    for (let n = 0, x = 0; n < 300000; n++) x += Math.sqrt(n ^ x);
    place.offsetHeight;
    times.push(performance.now() - start);
  }
  place.remove();
  return times.sort((a, b) => a - b)[3];
}"""
MOVES = """async (stops) => {
  const range = [...document.querySelectorAll('[data-knob=rank][type=range]')].find((e) => e.offsetWidth), times = [];
  const stage = range.closest('.stage'), [sentence, picture, axis] = ['.sentence', '.matrices', '.rank-axis'].map((n) => stage.querySelector(n));
  const repainted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const move = async (stop) => {
    const start = performance.now();
    range.value = stop;
    range.dispatchEvent(new Event('input', {bubbles: true}));
    await repainted();
    const time = performance.now() - start;
    const rank = +range.getAttribute('aria-valuetext').slice(5), shows = (text) => { if (!text) throw new Error('rank ' + rank + ' is not shown'); };
    shows(sentence.textContent.startsWith(`Rank ${rank} on`));
    shows(picture.getAttribute('aria-label').includes(` by ${rank} and A is ${rank} by `) && picture.textContent.includes(` × ${rank}`));
    await repainted();
    shows(axis.textContent.endsWith(`rank ${rank}`));
    return time;
  };
  for (const stop of stops) {
    if (+range.value !== (stop + 59) % 60) await move((stop + 59) % 60);
    times.push(await move(stop));
  }
  return times;
}"""


def opened(page: Page) -> Page:
    """With the LoRA tab on screen and drawn."""
    expect(page.get_by_role("tab", name="LoRA", exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.locator(".layers button:visible").first).to_be_visible()
    return page


def throttle(page: Page, rate: float) -> None:
    page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": rate})


def test_sixty_moves_are_repainted_at_once_and_ask_nobody(app, open_page):
    """On a processor as slow as SLOWEST, each of 60 moves of the rank is on screen within 50 ms and sends no request.

    A move's time is from its event until the frame is made that has its rank in the sentence, the picture and its
    captions. The axis, the map and the totals come in the frame after, and the next move waits for that. Others on the
    machine may hold up any move: those over the budget are made again, and each counts at its best.
    """
    page = opened(open_page(app.url + "?tab=lora"))
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=300_000)  # until then the page asks how far it is
    blank = page.context.new_page()
    throttle(blank, 6)
    rate = max(1, 6 * min(1, SLOWEST / blank.evaluate(WORK)))  # six, or less where this machine is slower itself
    blank.close()
    sent = [""]
    page.on("request", lambda request: sent.append(request.url))
    while sent:  # and until its last answers have come
        sent.clear()
        page.wait_for_timeout(3000)
    throttle(page, rate)
    best = dict.fromkeys(range(60), float("inf"))
    made = 0
    while (slow := [stop for stop, time in best.items() if time > BUDGET]) and made < 600:
        best.update({stop: min(best[stop], time) for stop, time in zip(slow, page.evaluate(MOVES, slow), strict=True)})
        made += len(slow)
    print(
        f"{made} moves; in ms, each at its best: median {sorted(best.values())[30]:.0f}, slowest {max(best.values()):.0f}"
    )
    assert not sent, "a slider that moves must not ask the server"
    assert not slow, f"{len(slow)} moves took longer than {BUDGET} ms"


def test_keys_change_rank_targets_and_layers_and_the_link_keeps_them(app, open_page):
    page = opened(open_page(app.url + "?tab=lora"))
    page.locator("[data-knob=method]:visible").focus()
    page.keyboard.press("Tab")
    expect(page.locator(KNOB.format("rank", "range"))).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(sentence(page)).to_contain_text("Rank 9 on every linear layer")
    page.get_by_role("checkbox", name="q_proj").focus()
    page.keyboard.press("Space")
    expect(sentence(page)).to_contain_text("Rank 9 on k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj trains")
    page.get_by_role("button", name="layer 0", exact=True).focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="layer 2", exact=True)).to_be_focused()
    page.keyboard.press("Space")
    expect(sentence(page)).to_contain_text("of layers 1,3-31 trains")
    page.wait_for_url(re.compile("rank=9.*target_modules=k_proj.*layers=1%2C3-31"))
    again = opened(open_page(page.url))
    expect(sentence(again)).to_have_text(sentence(page).inner_text())


def test_bad_input_is_refused_on_the_spot_and_cured(app, open_page):
    page = opened(open_page(app.url + "?tab=lora&target_modules=q_proj"))
    problem, before = page.locator(".problem.here:visible"), sentence(page).inner_text()
    alpha = page.locator(KNOB.format("alpha", "number"))
    alpha.fill("0")
    expect(problem).to_contain_text("alpha=0: ΔW is multiplied by alpha")
    expect(sentence(page)).to_have_text(before)
    alpha.fill("16")
    expect(problem).to_have_count(0)
    page.get_by_role("checkbox", name="q_proj").uncheck()
    expect(problem).to_contain_text("no target module is ticked")
    page.get_by_role("checkbox", name="q_proj").check()
    expect(problem).to_have_count(0)
    expect(sentence(page)).to_have_text(before)
    page.goto(app.url + "?tab=lora&target_modules=nosuch")
    expect(page.locator(".problem:visible")).to_contain_text(
        re.compile("target-modules=nosuch: .* it has q_proj, k_proj")
    )


def test_a_refused_rank_is_in_its_box_the_link_and_the_refusal_beside_it(app, open_page):
    page = opened(open_page(app.url + "?tab=lora&rank=16"))
    box, beside = page.locator(KNOB.format("rank", "number")), page.locator("#lora-rank .problem:visible")
    box.fill("1000000000")
    page.wait_for_url(re.compile("rank=1000000000"))
    for _ in range(2):
        expect(beside).to_have_count(1)
        expect(beside).to_contain_text("rank=1000000000: no adapted matrix has a rank above 4096")
        expect(box).to_have_value("1000000000")
        expect(sentence(page)).to_contain_text("Rank 8 on every linear layer")
        page.reload()
    page.go_back()
    expect(box).to_have_value("16")
    expect(beside).to_have_count(0)
    expect(sentence(page)).to_contain_text("Rank 16 on every linear layer")


def test_who_leaves_at_once_takes_the_settings_along(app, open_page):
    """The settings are reported after 400 ms without a move, or as soon as the reader presses on something else."""
    page = opened(open_page(app.url + "?tab=lora"))
    page.evaluate(
        "window.setTimeout = ((later) => (f, ms, ...rest) => ms === 400 ? 1 : later(f, ms, ...rest))(setTimeout)"
    )
    page.locator(KNOB.format("rank", "number")).fill("24")
    expect(sentence(page)).to_contain_text("Rank 24 on")
    page.get_by_role("tab", name="Memory", exact=True).hover()
    page.mouse.down()
    page.wait_for_url(re.compile("rank=24"))
    page.mouse.up()
    expect(sentence(page)).to_contain_text("LoRA, rank 24")


def test_an_alpha_from_a_link_is_kept_and_drawn_however_large(app, open_page):
    page = opened(open_page(app.url + "?tab=lora&rank=8&alpha=256&layers=first:4"))
    alpha = page.locator(KNOB.format("alpha", "range"))
    expect(page.locator(KNOB.format("alpha", "number"))).to_have_value("256")
    expect(alpha).to_have_attribute("aria-valuetext", "alpha 256")
    assert 0 < int(alpha.input_value()) < int(alpha.get_attribute("max"))
    alpha.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(KNOB.format("alpha", "number"))).to_have_value("288")
    page.wait_for_url(re.compile("alpha=288.*layers=first(:|%3A)4"))


def test_a_touched_number_shows_what_made_it(app, open_page):
    page = opened(open_page(app.url + "?tab=lora&__theme=dark", PHONE, "dark"))
    two = page.get_by_role("button", name="2", exact=True).locator("visible=true")
    width = two.bounding_box()["width"]
    two.click()
    expect(two).to_have_attribute("aria-pressed", "true")
    assert two.bounding_box()["width"] == width  # or the row of ranks wraps and what is below it jumps
    cell = page.locator(".toy-w td").nth(7)
    cell.scroll_into_view_if_needed()
    cell.hover()
    expect(page.locator(".toy-b td.lit, .toy-a td.lit")).to_have_count(4)
    said = re.compile(r"^Row 2 of B times column 3 of A: (.*) = (\S+); in ΔW, times 2")
    expect(page.locator(".toy-said")).to_have_text(said)
    sum_of, total = said.match(page.locator(".toy-said").inner_text()).groups()
    assert eval(sum_of.replace("×", "*").replace("−", "-")) == int(total) == int(cell.inner_text().replace("−", "-"))
    page.locator(".toy-w td").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".toy-said")).to_contain_text("Row 2 of B times column 1 of A")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    for part in page.locator(".stage:visible .main > *:visible, .matrices, .rank-axis svg, .map-row, .totals").all():
        if box := part.bounding_box():
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0] + 0.5


def test_a_screen_reader_finds_names_and_numbers(app, open_page):
    page = opened(open_page(app.url + "?tab=lora"))
    spoken = "W is 4096 by 4096 and frozen; B is 4096 by 8 and A is 8 by 4096, both trained"
    expect(page.get_by_role("img", name=re.compile(spoken)).locator("visible=true")).to_have_count(1)
    expect(page.get_by_role("img", name=re.compile("reach the matrix's own at rank 2048"))).to_have_count(1)
    for role, name in (
        ("combobox", "Method"), ("slider", "Rank"), ("spinbutton", "number input for Rank"), ("slider", "Alpha"),
        ("spinbutton", "number input for Alpha"), ("checkbox", "q_proj"), ("button", "layer 31"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name).locator("visible=true").first).to_be_visible()
    nameless = page.evaluate(
        """[...document.querySelectorAll('.stage input, .stage select, .stage button')].filter((e) => e.offsetWidth
          && !e.getAttribute('aria-label') && !e.labels?.length && !e.textContent.trim()).map((e) => e.outerHTML)"""
    )
    assert not nameless
