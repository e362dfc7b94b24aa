"""What the lectures state: every number of theirs has a statement, every statement a finding, and every reason adds up."""

import json
import re
from dataclasses import asdict
from inspect import getmodule, isfunction
from itertools import groupby

import pytest
from tiny import ROOT

from peftlab import RunSpec, count, resolve, units
from peftlab.lectures import by_counting, by_racing
from peftlab.lectures.by_counting import Number
from peftlab.lectures.lessons import LESSONS, finding
from peftlab.lectures.statements import FAILS, HOLDS, OPEN, STATEMENTS
from peftlab.methods import METHODS
from peftlab.race import Line, recordings
from peftlab.race.recordings import Recording
from peftlab.show.statements import tab_table

LECTURES = ("lecture-11-2", "kiit-tutorial", "beginners-guide", "vanderbilt-slides")
QV = "q_proj,v_proj"
DIFFER = [
    "7b-gpu", "gemma-r8", "gemma-r8-share", "gemma-r16", "gemma-r16-share", "gemma-r64", "gemma-r64-share",
    "7b-r64-share", "70b-r64", "70b-r64-share", "adapter-file", "200-times", "lora-r64-share", "lora-modular",
    "kiit-forgetting", "bapna", "pfeiffer-vector", "parallel-path", "two-d-r", "qv-share", "lora-plus-plus",
    "guide-bitfit", "guide-ia3", "guide-prefix", "gpt-4-size",
]  # fmt: skip
"""The statements that count otherwise than the lecture says, or that a person reads so."""
COUNTED = [statement for statement in STATEMENTS.values() if not statement.lesson]
ROWS = [row.split("\t") for row in (ROOT / "tests/lecture_numbers.tsv").read_text().splitlines()]
NUMBERS = {s.id: Number(**s.given) for s in COUNTED if s.test == "number"}


def timed(monkeypatch, times):
    """A recording has these times of a token, apart and merged; without any, there is none."""
    lines = [
        Line(key, {"method": key, "model": "gpt2", "precision": "bf16"}, 1, 1.0, 1, 1, apart=apart, merged=merged)
        for key, (apart, merged) in times.items()
    ]
    lines.append(Line("x", {"method": "dora", "model": "gpt2"}, 0, 0.0, 0, 0, error="out of memory"))
    recording = Recording(tuple(lines), "H", "cuda", "D", {"torch": "2"}, ("C",))
    monkeypatch.setattr(recordings, "of", lambda key: [recording] if times else [])


def digits(text):
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


@pytest.mark.parametrize("lecture, ids, words", [row for row in ROWS if not row[1].startswith("- ")])
def test_every_number_of_the_lectures_has_a_statement(lecture, ids, words):
    """The file holds each line of the four texts that has a digit, with the ids of its statements, or, after a dash, why
    it states nothing: it is a heading, a citation, a formula, a name, a link, code or an example."""
    stated = [STATEMENTS[id] for id in ids.split()]
    assert lecture in LECTURES and all(statement.source.startswith(lecture) for statement in stated)
    assert digits(words) <= digits(json.dumps([asdict(statement) for statement in stated], ensure_ascii=False))


def test_every_statement_has_one_test_and_shows_somewhere():
    used = {statement.test for statement in STATEMENTS.values()} - {""}
    functions = [
        f for of in (by_counting, by_racing) for f in vars(of).values() if getmodule(f) == of and isfunction(f)
    ]
    assert used == {f.__name__ for f in functions if not f.__name__.startswith("_")} - {"compared", "percents"}
    for statement in STATEMENTS.values():
        assert bool(statement.test) != (statement.same_as in STATEMENTS)
        assert bool(statement.tabs) != (statement.lesson in LESSONS)
        assert statement.source.startswith((*LECTURES, "peftlab's method cards")) and statement.says


@pytest.mark.parametrize("statement", COUNTED, ids=lambda s: s.id)
def test_a_statement_holds_or_says_why_not(statement):
    found = finding(statement.id)
    assert found.words and (found.verdict == OPEN) == (statement.id == "prompts-need-scale")
    assert (found.verdict == FAILS) == (statement.id in DIFFER)
    assert found.verdict == HOLDS or statement.why or STATEMENTS[statement.same_as].why


def test_times_are_the_recorded_ones_or_the_registrys_words(monkeypatch):
    times = {"lora": (1.6, 1.0), "houlsby": (1.5, None), "prompt": (1.04, None), "prefix": (1.1, None)}
    of_time = [s for s in COUNTED if s.test == "time"]
    for recorded in ({}, times):
        timed(monkeypatch, recorded)
        assert {finding(s.id).verdict for s in of_time} == {HOLDS}
        for s in of_time:
            assert recorded or finding(s.id).words == METHODS[s.given["method"]].about.inference
    lora = "Measured on GPT-2, a token takes 1.60× the base's time apart, 1.00× merged."
    assert finding("lora-time").words == lora
    timed(monkeypatch, {"lora": (1.6, 1.4)})
    assert finding("lora-time").verdict == finding("lora-latency").verdict == FAILS


def test_tests_can_say_no():
    small = {"spec": {"model": "1B", "method": "full"}, "convention": "8n"}
    no = {
        "family": {"method": "bitfit", "wanted": "additive"},
        "paper": {"method": "lora", "authors": "Houlsby", "year": 2019},
        "preset": {"key": "alpha-r", "alpha_over_rank": 2},
        "merges": {"method": "houlsby", "can": True},
        "place": {"method": "lora", "wanted": "series"},
        "file": {"method": "full", "model": "gemma-3-270m"},
        "fewer": {"method": "houlsby", "than": ["pfeiffer"], "model": "gpt2"},
        "same": {"method": "lora", "other": "dora", "model": "gpt2"},
        "extra": {"method": "lora", "over": "dora", "model": "gpt2"},
        "virtual": {"method": "prefix", "model": "gpt2", "per_layer": False},
        "reduced": {**small, "than": small["spec"]},
        "gpus": {**small, "least": 8, "most": 16},
        "all_tasks": {**small, "trainable": 1_000_000_000},
        "cheaper": {"method": "full", "than": "lora", "model": "llama-3.1-8b"},
    }
    for test, given in no.items():
        assert getattr(by_counting, test)(**given).verdict == FAILS, test


@pytest.mark.parametrize("tab", ["memory", "lora", "methods"])
def test_a_tab_shows_each_of_its_statements_once_and_counts_them(tab):
    checked, shown = tab_table(tab), [s for s in STATEMENTS.values() if tab in s.tabs]
    found = [finding(statement.id).verdict for statement in shown]
    assert all(checked.html.count(f">{verdict}</span>") == found.count(verdict) for verdict in (HOLDS, FAILS, OPEN))
    assert checked.counted.startswith(f"{found.count(HOLDS)} statements hold, {found.count(FAILS)} do not")
    sources = [source for source, _ in groupby(statement.source for statement in shown)]
    assert len(sources) == len(set(sources)) == checked.html.count('class="source"') and "<script" not in checked.html


def trained(model, rank, targets=QV, **rest):
    return count(resolve(RunSpec(model=model, rank=rank, target_modules=targets, **rest)))


def share(report):
    return units.percent(report.trainable_percent / 100)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_the_gemma_rows_differ_for_the_reason_given(rank):
    number, percent = NUMBERS[f"gemma-r{rank}"], NUMBERS[f"gemma-r{rank}-share"]
    why = STATEMENTS[f"gemma-r{rank}"].why
    assert f"{number.computed() / number.value:.1f} times low" in why
    assert f"{trained('gemma-3-270m', rank, 'all-linear').trainable_parameters:,}" in why
    assert share(trained("llama-2-7b", rank)) in STATEMENTS[f"gemma-r{rank}-share"].why
    assert number.value == pytest.approx(percent.value / 100 * 270e6, rel=0.02)  # the one is made from the other


def test_the_reasons_of_the_larger_rows_add_up():
    fewer, given = trained("gemma-3-270m", 64), NUMBERS
    times = f"{fewer.total_parameters / fewer.trainable_parameters:.0f} times"
    assert f"{times} fewer" in STATEMENTS["gemma-r64-share"].why and finding("200-times").words == times
    assert round(given["7b-r64"].value / 7e9 * 100, 2) == given["7b-r64-share"].value
    assert f"{trained('llama-2-7b', 64).total_parameters:,}" in STATEMENTS["7b-r64-share"].why
    assert given["70b-r64"].value == pytest.approx(0.48e-2 * 70e9)
    attention = {m.module.role: m.module for m in trained("llama-2-70b", 64).modules if m.adapted_layers}
    width = attention["query"].d_in
    assert f"{4 * 64 * 2 * width * attention['query'].count:,}" in STATEMENTS["70b-r64"].why
    assert attention["value"].d_out < width == attention["query"].d_out
    why = STATEMENTS["adapter-file"].why
    assert f"make {units.size(4 * given['gemma-r64'].value)};" in why
    assert f"the exact {fewer.trainable_parameters:,} make {units.size(given['adapter-file'].computed())}" in why


ASIDES = {
    "adapters-share": {"model": "llama-2-70b", "method": "houlsby"},
    "lora-r64-share": {"model": "llama-2-7b", "rank": 64},
    "prompt-share": {"model": "gpt2", "method": "prompt"},
    "prefix-share": {"model": "bert-base", "method": "prefix"},
    "bert-large-share": {"model": "bert-large", "method": "bitfit", "train_norms": True},
    "kiit-share": {"model": "gpt3-175b", "rank": 8},
    "ia3-share": {"model": "llama-2-7b", "method": "ia3"},
    "qv-share": {"model": "gemma-3-270m", "rank": 8, "target_modules": QV},
    "last-layers-share": {"model": "llama-2-7b", "rank": 8, "target_modules": QV},
}


@pytest.mark.parametrize("id", ASIDES)
def test_a_second_number_in_a_reason_is_counted_too(id):
    assert share(count(resolve(RunSpec(**ASIDES[id])))) in STATEMENTS[id].why
