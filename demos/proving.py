"""The LoRA tab's proofs by doing: merging, the dial on the update, and what each way to serve an adapter costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from demos import choice, page
from demos.adapter_choice import bundled, choices, of, task_of
from demos.gpu import on_gpu
from demos.tab import ONE_AT_A_TIME, QUIET, Asked, Draw, Tab
from peftlab import PeftlabError, proofs, words
from peftlab.proofs import LatencyReport, MergeReport

NAMES = {
    proofs.BASE: "base",
    proofs.APART: "adapter beside its weights",
    proofs.MERGED: "adapter merged into them",
    proofs.SERIAL: "serial adapter (Houlsby)",
}


def merge(key: str, prompt: str) -> MergeReport:
    return proofs.merge_check(of(key), prompt)


def dial(key: str, prompt: str) -> Iterator[tuple[float, str]]:
    yield from proofs.dial(of(key), prompt)


def latency(key: str, prompt: str) -> Iterator[tuple[float, LatencyReport | None]]:
    doing = proofs.latency(of(key), prompt)
    while True:
        try:
            yield next(doing), None
        except StopIteration as finished:
            yield 1.0, finished.value
            return


MERGE, DIAL, LATENCY = on_gpu(merge), on_gpu(dial), on_gpu(latency)


def merged_said(report: MergeReport) -> str:
    rows = "".join(
        f"<tr><td>{a.precision}</td><td>{words.significant(a.largest_difference, 2)}</td>"
        f"<td>{len(a.flips)} of {a.positions}</td><td>{words.significant(a.apart_off, 2)}</td>"
        f"<td>{words.significant(a.merged_off, 2)}</td></tr>"
        for a in report.agreements
    )
    flips = "; ".join(
        f"token {f.position}: <code>{_quoted(f.apart)}</code> becomes <code>{_quoted(f.merged)}</code>, which trailed by "
        f"{words.significant(f.margin, 2)}"
        for a in report.agreements
        for f in a.flips
    )
    whole, half = report.agreements
    moved = [words.significant(a.largest_difference, 2) for a in (whole, half)]
    return (
        f"<p>The adapter moves a logit by up to <b>{words.significant(report.adapter_moves)}</b>. In fp32, merging moves one "
        f"by at most <b>{moved[0]}</b> and changes {len(whole.flips)} of {whole.positions} likeliest tokens. In bf16 it moves "
        f"one by up to <b>{moved[1]}</b> and changes {len(half.flips)}, where bf16 alone, unmerged, is off by "
        f"{words.significant(half.apart_off, 2)}.</p>"
        '<div class="wide"><table class="data"><tr><th></th><th>largest logit difference, apart to merged</th>'
        "<th>likeliest token differs</th><th>apart, off fp32</th><th>merged, off fp32</th></tr>"
        f"{rows}</table></div>" + (f'<p class="note">{flips}</p>' if flips else "")
    )


def _quoted(token: str) -> str:
    """Blanks and all."""
    return escape(json.dumps(token, ensure_ascii=False), quote=False)


def dialled(stops: list[tuple[float, str]]) -> str:
    rows = "".join(
        f"<tr><td>λ = {stop:g}<br><small>{'the base' if stop == 0 else 'the adapter' if stop == 1 else ''}</small></td>"
        f'<td class="said">{escape(text.strip())}</td></tr>'
        for stop, text in stops
    )
    return f'<div class="wide"><table class="data answers dial"><tr><th>W₀ + λΔW</th><th>answer</th></tr>{rows}</table></div>'


def timed(report: LatencyReport) -> str:
    base = report.speeds[0]
    mark = page.how(
        "measured",
        f"{report.device}, {report.precision}, batch 1; medians of {report.rounds} rounds of {report.tokens} tokens, taken in "
        "turn; in brackets the quartiles. " + ", ".join(f"{k} {v}" for k, v in report.versions.items()),
    )
    rows = "".join(
        f"<tr><td>{NAMES[s.what]}</td><td><b>{s.ratio:.2f}×</b> <small>({s.lower / base.seconds:.2f} to "
        f"{s.upper / base.seconds:.2f})</small></td><td>{1000 * s.seconds:.1f} ms</td><td>{s.added_modules:,}</td>"
        f"<td>{s.added_parameters:,}</td></tr>"
        for s in report.speeds
    )
    return (
        f'<div class="wide"><table class="data"><tr><th>{mark}</th><th>time a token over the base\'s</th><th>a token</th>'
        f"<th>modules added</th><th>parameters added</th></tr>{rows}</table></div>"
    )


CHOICES = {"proof_prompt": choice.words("proof_prompt")}
"""Unless it is written, the first held-out prompt of the adapter's task."""
ANOTHER = "(proof_adapter) => { peftlab.keep({proof_adapter}); peftlab.write({proof_prompt: ''}); }"
IDLE = (
    "h = W₀x + (alpha / r)BAx = (W₀ + (alpha / r)BA)x: kept apart or added up, the layer is the same. "
    "Merge and see how exactly; scale the update from nothing to twice itself; measure what each way costs."
)


def build(tab: Tab) -> None:
    about = {"label": "Adapter", "info": "Trained here, or bundled with the app"}
    adapter = tab.panel("proof_adapter", gr.Dropdown(choices([]), value=list(bundled())[-1], **about))
    adapter.input(None, adapter, None, js=ANOTHER, **QUIET)
    tab.control("proof_prompt", gr.Textbox(label="Prompt", lines=2, max_lines=5))
    tab.panel("proof_problem", page.problem())
    with gr.Row(elem_classes="lessons"):
        for name, job in JOBS.items():
            tab.panel(name, gr.Button(job.label, size="sm"))
    tab.panel("proved", gr.HTML(f'<p class="note">{IDLE}</p>'))
    busy, free = ({name: gr.update(interactive=is_free) for name in JOBS} for is_free in (False, True))
    for name, job in JOBS.items():
        tab.press(tab.panels[name], job.press, ["proved"], busy, free, "proof_problem", **ONE_AT_A_TIME)


def fill(asked: Asked) -> dict[str, Any]:
    return {"proof_prompt": prompt(asked)}


def draw(asked: Asked) -> dict[str, Draw]:
    return {"proof_adapter": lambda: gr.update(choices=choices(asked.kept.get("adapters")), value=chosen(asked))}


def chosen(asked: Asked) -> str:
    """The key of the adapter to prove with: a bundled one where the visitor's choice is not here any more."""
    key = asked.kept.get("proof_adapter")
    try:
        of(key)
        return str(key)
    except PeftlabError:
        return list(bundled())[-1]


def prompt(asked: Asked) -> str:
    return asked["proof_prompt"] or task_of(of(chosen(asked))).heldout[0].prompt


def merging(asked: Asked) -> Iterator[str]:
    yield merged_said(MERGE(chosen(asked), prompt(asked)))


def turning(asked: Asked) -> Iterator[str]:
    stops: list[tuple[float, str]] = []
    for stop in DIAL(chosen(asked), prompt(asked)):
        stops.append(stop)
        yield dialled(stops)


def timing(asked: Asked) -> Iterator[str]:
    for share, report in LATENCY(chosen(asked), prompt(asked)):
        yield timed(report) if report else f'<p class="note">Timing, {words.score(share)} done.</p>'


@dataclass(frozen=True)
class Job:
    """A proof: its button, what is said while it begins, and what it shows as it goes on."""

    label: str
    begins: str
    work: Callable[[Asked], Iterator[str]]

    def press(self, asked: Asked) -> Iterator[dict[str, Any]]:
        yield {"proved": f'<p class="note">{self.begins}</p>'}
        try:
            yield from ({"proved": shown} for shown in self.work(asked))
        except PeftlabError:
            yield {"proved": ""}
            raise


JOBS = {
    "merge": Job(
        "Merge and compare", "Reading the same text with four models: apart and merged, in fp32 and in bf16.", merging
    ),
    "dial": Job("Turn the dial from 0 to 2", "Answering five times.", turning),
    "latency": Job("Time the four ways to serve it", "Loading the four models.", timing),
}
