"""The app on a ZeroGPU Space: each press asks for its own few seconds of a GPU, in a process of its own."""

from pathlib import Path

import pytest

pytest.importorskip("playwright")
from conftest import App
from playwright.sync_api import Page, expect
from zerogpu import Device, token


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


def test_each_press_asks_for_its_own_seconds_and_what_it_learned_is_there_for_the_next(device, visit):
    page = visit("ann")
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.get_by_role("button", name="Train again")).to_be_enabled(timeout=60_000)
    expect(page.locator("#live-keep")).to_be_visible()
    (call,) = device.calls
    assert call["visitor"] == "ann" and not call["killed"] and 0 < call["used"] < call["asked"] <= 20
