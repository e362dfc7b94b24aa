"""Sequences of what visitors do, while answers come late, fail or are lost; and whether the page ends up right.

`python tests/browser/faults.py FIRST LAST [--busy N] [--at-once M] [--out FILE.json]` runs the sequences of these seeds
against apps of their own, M at a time, beside N processes that are busy all the time, and writes what came of each.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

TABS = ("memory", "lora", "live", "compare", "methods", "race")
ACTIONS = 14
PATIENCE = 5.0
"""Seconds of rest after which everything must be right."""
FAULTS = """(seed) => {
  const random = () => (seed = seed * 16807 % 2147483647) / 2147483647, real = window.fetch;
  window.faulty = true;
  window.fetch = async (where, ...rest) => {
    if (!String(where.url ?? where).includes('component_server')) return real(where, ...rest);
    const chance = random(), late = 2000 * random();
    if (window.faulty) await new Promise((done) => setTimeout(done, late));
    if (window.faulty && chance < 0.1) return new Response('{}', {status: 500});
    const answer = window.faulty && chance < 0.15 ? null : await real(where, ...rest);
    if (window.faulty && chance < 0.25) throw new TypeError('dropped');
    return answer ?? await real(where, ...rest);
  };
}"""
SHOWS = """([tab, show, names]) => {
  const text = (html) => { const e = document.createElement('div'); e.innerHTML = html; return e.textContent.replace(/\\s+/g, ' ').trim(); };
  const wrong = [];
  for (const [name, {value, visible, choices}] of Object.entries(show)) {
    const id = name.replace('.', '-'), place = document.getElementById(id);
    if (!place || visible === false || value === undefined || value === null || !place.offsetParent) continue;
    if (name === `${tab}.problem`) continue;
    const named = (one) => Object.fromEntries(choices?.map(([text, key]) => [key, text]) ?? names[id] ?? [])[one] ?? String(one);
    const boxes = [...place.querySelectorAll('input, textarea, select')], kinds = boxes.map((b) => b.type);
    let found = null, wanted = String(value);
    if (typeof value === 'boolean' && kinds.includes('checkbox')) [found, wanted] = [boxes[0].checked, value];
    else if (kinds.includes('number')) [found, wanted] = [+boxes[kinds.indexOf('number')].value, +value];
    else if (kinds.includes('radio')) found = boxes.find((b) => b.checked)?.value ?? '';
    else if (kinds.includes('select-one')) [found, wanted] = [boxes[kinds.indexOf('select-one')].value, value.method ?? value];
    else if (Array.isArray(value)) {
      if (kinds.includes('checkbox')) [found, wanted] = [boxes.filter((b) => b.checked).length, value.length];
      else [found, wanted] = [[...place.querySelectorAll('.token')].map((e) => e.innerText.trim()).join(), value.map(named).join()];
    } else if (place.querySelector('[role=combobox]')) [found, wanted] = [place.querySelector('[role=combobox]').value, named(value)];
    else if (kinds.includes('textarea') || kinds[0] === 'text') found = boxes[0].value;
    else if (typeof value === 'string' && value && place.querySelector('.html-container, .prose, .note, div')) [found, wanted] = [place.innerText.replace(/\\s+/g, ' ').trim().length > 0, true];
    if (found !== null && found !== wanted) wrong.push(`${name}: ${found} instead of ${wanted}`);
    if (typeof value === 'string' && !boxes.length && !place.textContent.replace(/\\s+/g, ' ').includes(text(value))) wrong.push(`${name}: another text than ${text(value).slice(0, 80)}`);
  }
  return wrong;
}"""


class Server:
    """The app, asked past the page: what Python says of settings."""

    def __init__(self, url: str) -> None:
        self.url = url
        config = json.load(urllib.request.urlopen(url + "config"))
        self.names = {
            c["props"]["elem_id"]: [[key, name] for name, key in c["props"]["choices"]]
            for c in config["components"]
            if c["props"].get("choices") and c["props"].get("elem_id")
        }
        self.component = next(c["id"] for c in config["components"] if "answer" in (c["props"].get("server_fns") or []))

    def answer(self, tab: str, state: dict, kept: dict) -> dict:
        question = {"number": 0, "tab": tab, "state": state, "kept": kept, "open": []}
        body = {"data": question, "component_id": self.component, "fn_name": "answer", "session_hash": "faults"}
        request = urllib.request.Request(
            self.url + "gradio_api/component_server", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))


class Visitor:
    """One sequence, decided by its seed."""

    def __init__(self, page, server: Server, seed: int) -> None:
        self.page, self.server, self.draw = page, server, random.Random(seed)
        self.did: list[str] = []

    def run(self) -> list[str]:
        """What is wrong at the end: nothing, if all went well."""
        acts = [self.number, self.number, self.slide, self.method, self.tab, self.tab, self.lesson, self.back, self.forward,
                self.link, self.preset, self.chip, self.race]  # fmt: skip
        for _ in range(ACTIONS):
            act = self.draw.choice(acts)
            self.did.append(act.__name__)
            act()
            self.page.wait_for_timeout(30)  # Gradio tells of a change in its own time
            settings = self.page.evaluate("peftlab.get().state")
            self.page.wait_for_timeout(self.draw.choice([0, 0, 50, 300, 900]))
            seen = settings, self.page.evaluate("peftlab.get().state")
            before, after = (self.server.answer("memory", state, {})["state"] for state in seen)
            if before != after:
                return [f"settings changed by themselves from {before} to {after}"]
        self.arrived()
        self.page.evaluate("window.faulty = false")
        found = self.within(self.on())
        for tab in TABS:
            if not found and tab != self.on():
                self.go(tab)
                found = self.within(tab)
        return found

    def within(self, tab: str) -> list[str]:
        """What the tab on screen does not show rightly, PATIENCE seconds from now."""
        until = time.monotonic() + PATIENCE
        while True:
            found = self.differences(tab)
            if not found or time.monotonic() > until:
                return found
            self.page.wait_for_timeout(200)

    def differences(self, tab: str) -> list[str]:
        of = self.page.evaluate("peftlab.get()")
        if of["resting"]:
            return ["the page is not at rest"]
        said = self.server.answer(tab, of["state"], of["kept"])
        address = dict(parse_qsl(urlsplit(self.page.url).query))
        public = {name: value for name, value in said["state"].items() if not re.search(r"-\d{6}-[0-9a-f]{6}$", value)}
        wanted = public | ({} if tab == "memory" else {"tab": tab})
        if address != wanted:
            return [f"the address says {address} instead of {wanted}"]
        if set(said["problems"]) and not self.page.locator(".problem:visible").count():
            return [f"no refusal of {said['problems']}"]
        return self.page.evaluate(SHOWS, [tab, said["show"], self.server.names]) + self.sentence(tab, said["show"])

    def sentence(self, tab: str, show: dict) -> list[str]:
        """The tab's own instrument, which draws what no other place says."""
        text, wanted = self.page.locator(".sentence:visible").first.inner_text(), ""
        if tab == "memory":
            drawn = show["memory.bars"]["value"]
            run = drawn["runs"][-1]
            wanted = unescape(run["name"]).replace("{rank}", str(drawn["at"][2]))
            if run["exact"]:
                from peftlab.units import size

                wanted += f" needs {size(sum(run['exact'].values()))}"
        if tab == "lora":
            wanted = f"ank {show['lora.picture']['value']['at']['rank']}"
        return [] if wanted in text else [f"the sentence says {text!r}, without {wanted}"]

    def arrived(self) -> None:
        """Once the document is there that a link, Back or Forward has opened."""
        self.page.wait_for_timeout(100)
        self.page.wait_for_load_state()
        self.page.wait_for_function("window.peftlab")

    def on(self) -> str:
        return self.page.evaluate("peftlab.get().tab")

    def go(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab.capitalize().replace("Lora", "LoRA"), exact=True).click()

    def tab(self) -> None:
        self.go(self.draw.choice(TABS))

    def number(self) -> None:
        value = str(self.draw.choice([1, 3, 8, 24, 64, 200, "-3", "0.5"]))
        place = {
            "memory": "#memory-rank input[type=number]", "lora": "[data-knob=rank][type=number]:visible",
            "live": "#live-steps input, #live-steps textarea", "race": "#race-steps input, #race-steps textarea",
        }.get(self.on())  # fmt: skip
        if not place:
            return self.page.evaluate("(rank) => peftlab.write({rank})", value)
        box = self.page.locator(place)
        with contextlib.suppress(Exception):  # it may not be on screen for this method
            box.fill(value, timeout=300)
            box.blur(timeout=300)

    def slide(self) -> None:
        slider = self.page.locator("#memory-batch_size input[type=range]:visible, [data-knob=rank][type=range]:visible")
        if slider.count():
            slider.first.focus()
            for _ in range(self.draw.randint(1, 9)):
                self.page.keyboard.press("ArrowRight")
                self.page.wait_for_timeout(20)

    def method(self) -> None:
        select = self.page.locator(f"#{self.on()}-method select:visible, [data-knob=method]:visible").first
        if select.count():
            select.select_option(self.draw.choice(["lora", "dora", "vera", "rslora"]))

    def lesson(self) -> None:
        buttons = self.page.locator(".lessons button:visible")
        if buttons.count() and self.on() in ("memory", "lora"):
            buttons.nth(self.draw.randrange(buttons.count())).click()

    def back(self) -> None:
        self.page.evaluate("navigation.canGoBack && history.back()")
        self.arrived()

    def forward(self) -> None:
        self.page.evaluate("navigation.canGoForward && history.forward()")
        self.arrived()

    def link(self) -> None:
        models = ["gpt2", "smollm2-135m", "llama-2-7b"]
        query = {"rank": self.draw.choice([2, 5, 77]), "model": self.draw.choice(models)}
        query |= self.draw.choice([{}, {"tab": "lora"}, {"convention": "12n"}, {"tab": "race", "sort": "forgetting"}])
        self.page.goto(self.server.url + "?" + urlencode(query))
        self.arrived()

    def preset(self) -> None:
        reset = self.page.get_by_role("button", name="Reset to automatic").locator("visible=true")
        if reset.count():
            reset.first.click()

    def chip(self) -> None:
        chips = self.page.locator("button[data-method]:visible:not([aria-disabled=true])")
        if chips.count():
            chips.nth(self.draw.randrange(chips.count())).click()

    def race(self) -> None:
        if self.on() == "race":
            radios = self.page.locator("#race-lesson input[type=radio]")
            radios.nth(self.draw.randrange(radios.count())).check(force=True)


def sequence(browser, server: Server, seed: int) -> list[str]:
    """Runs a seed's sequence in a new window. Returns what was wrong, each line with the seed and what was done."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.add_init_script(f"({FAULTS})({seed + 1})")
    visitor = Visitor(page, server, seed)
    try:
        page.goto(server.url)
        page.wait_for_function("window.peftlab")
        page.wait_for_selector(".sentence >> visible=true")
        return [f"seed {seed} ({', '.join(visitor.did)}): {line}" for line in visitor.run()]
    finally:
        context.close()


def spin() -> None:
    while True:
        pass


def played(seeds: list[int]) -> Iterator[tuple[int, list[str]]]:
    """Each seed's sequence, one after the other, against an app and in a browser of their own, and what was wrong at its end."""
    from conftest import App
    from playwright.sync_api import sync_playwright

    app = App(None, Path(tempfile.mkdtemp()))
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        server = Server(app.url)
        for seed in seeds:
            yield seed, sequence(browser, server, seed)
        browser.close()
    app.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from peftlab.measured import provenance

    spinning = [multiprocessing.Process(target=spin, daemon=True) for _ in range(args.busy)]
    for process in spinning:
        process.start()
    results: dict[int, list[str]] = {}
    writing = threading.Lock()

    def play(start: int) -> None:
        for seed, wrong in played(list(range(args.first + start, args.last + 1, args.at_once))):
            with writing:
                results[seed] = wrong
                print(seed, wrong or "right", flush=True)
                if args.out:
                    write()

    def write() -> None:
        document = provenance() | {
            "command": f"python {' '.join(sys.argv)}", "kind": "faults", "sequences": len(results), "busy_processes": args.busy,
            "at_once": args.at_once, "actions": ACTIONS, "wrong": {n: lines for n, lines in sorted(results.items()) if lines},
        }  # fmt: skip
        args.out.write_text(json.dumps(document, indent=1) + "\n")

    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(play, range(args.at_once)))
    sys.exit(any(results.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
