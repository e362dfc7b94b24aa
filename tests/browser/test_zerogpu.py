"""The app on a ZeroGPU Space: each press asks for its own few seconds of a GPU, in a process of its own."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("playwright")
from conftest import App
from playwright.sync_api import Page, expect
from zerogpu import DAY, Device, token

WHILE = 60_000
"""Milliseconds that a run may take on a busy machine."""


@pytest.fixture(scope="module")
def device():
    with Device() as lends:
        yield lends


@pytest.fixture(scope="module")
def space(chromium, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in device.environment.items():
            patch.setenv(name, value)
        running = App(None, folder, Path(__file__).with_name("zerogpu.py"), str(folder))
    yield running
    running.end()


@pytest.fixture
def visit(space, open_page):
    def go(visitor: str, address: str = "?tab=live") -> Page:
        return open_page(space.url + address, headers={"X-IP-Token": token(visitor)})

    return go


def calls(device: Device, visitor: str) -> list[dict]:
    return [call for call in device.calls if call["visitor"] == visitor]


def press(page: Page, device: Device, visitor: str, name: str) -> dict:
    """The call for a GPU that a press makes, once it is over."""
    before = len(calls(device, visitor))
    page.get_by_role("button", name=re.compile(name)).click()
    until(page, lambda: len(own := calls(device, visitor)) > before and own[-1]["used"])
    return calls(device, visitor)[-1]


def until(page: Page, holds: Callable[[], object]) -> None:
    for _ in range(WHILE // 100):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not come to that")


def test_every_tab_asks_for_its_own_seconds_and_finds_what_was_learned_before(space, device, visit):
    page = visit("ann")
    expect(page.locator("#live-cost")).to_have_text(
        re.compile(r"Train: about .* of your GPU time; \d+(\.\d)?\ss are asked for")
    )
    for _ in range(3):
        press(page, device, "ann", "^Train( again)?$")
        expect(page.get_by_role("button", name="Train again")).to_be_enabled()
    expect(page.locator("#live-keep")).to_be_visible()
    assert sum(call["asked"] for call in calls(device, "ann")) <= DAY
    page.get_by_role("tab", name="Compare").click()
    press(page, device, "ann", "^Ask both")
    expect(page.locator("#compare-said")).to_contain_text("just now")
    press(page, device, "ann", "^Score all")
    expect(page.locator("#compare-whence")).to_contain_text("Measured here")
    page.get_by_role("tab", name="LoRA", exact=True).click()
    page.evaluate("() => peftlab.keep({proof_adapter: peftlab.get().kept.run})")
    page.get_by_role("button", name=re.compile("Proofs")).click()
    press(page, device, "ann", "^Merge and compare")
    expect(page.locator("#lora-proved")).to_contain_text("The adapter moves a logit")
    page.evaluate("() => peftlab.keep({studied: peftlab.get().kept.run})")
    page.get_by_role("button", name=re.compile("The mathematics")).click()
    page.get_by_role("button", name="Add it").click()
    study = (
        space.log.parent / "data" / "jobs" / page.evaluate("() => peftlab.get().kept.run") / "adapter" / "study.json"
    )
    until(page, study.exists)
    own = calls(device, "ann")
    assert len(own) == 6 and len({call["pid"] for call in own}) == 6
    assert all(not call["killed"] and 0 < call["used"] < call["asked"] for call in own)


def test_a_race(device, visit):
    page = visit("bea", "?tab=race&values=4;8&steps=2&guess=show me&lesson=rank")
    call = press(page, device, "bea", "^Race here")
    expect(page.get_by_role("button", name="Race again")).to_be_enabled()
    assert not call["killed"] and 0 < call["used"] < call["asked"]


def test_who_has_used_up_the_quota_is_told_and_loses_nothing(device, visit):
    device.left["cem"] = 3.0
    page = visit("cem", "?tab=live&rank=4&seed=7")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator("#live-bar")).to_contain_text("3 s of your quota are left", timeout=WHILE)
    expect(page.locator("#live-bar")).to_contain_text("sign in to Hugging Face")
    assert "rank=4" in page.url and "seed=7" in page.url
    device.left["cem"] = DAY
    press(page, device, "cem", "^Resume")
    expect(page.get_by_role("button", name="Train again")).to_be_enabled(timeout=WHILE)
    expect(page.locator("#live-keep")).to_be_visible()


def test_what_goes_wrong_there_is_said_with_its_cure(device, visit):
    page = visit("dan", "?tab=live&learning_rate=10&method=full&steps=40")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator("#live-bar")).to_contain_text("training diverged at a learning rate of 10", timeout=WHILE)
    expect(page.locator("#live-bar [data-replace]")).to_be_visible()


def test_a_run_whose_time_is_over_keeps_what_it_has_learned(device, visit):
    page = visit("eve", "?tab=live&steps=5000")
    assert not press(page, device, "eve", "^Train$")["killed"]
    expect(page.get_by_role("button", name="Train again")).to_be_enabled()
    expect(page.locator("#live-keep")).to_be_visible()
    expect(page.locator("#live-bar")).to_contain_text("which is the most that a run may take here")
