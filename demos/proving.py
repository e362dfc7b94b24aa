"""The LoRA tab's proofs by doing: merging, the dial on the update, and what each way to serve an adapter costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from demos import page
from demos.adapter_choice import choices, of, task_of
from demos.gpu import on_gpu
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


def build(first: str) -> gr.Dropdown:
    """Returns the choice of the adapter."""
    adapter = gr.Dropdown(choices([]), value=first, label="Adapter", info="Trained here, or bundled with the app")
    prompt = gr.Textbox(task_of(of(first)).heldout[0].prompt, label="Prompt", lines=2, max_lines=5)
    problem = page.problem()
    with gr.Row(elem_classes="lessons"):
        check = gr.Button("Merge and compare", size="sm")
        turn = gr.Button("Turn the dial from 0 to 2", size="sm")
        time = gr.Button("Time the four ways to serve it", size="sm")
    shown = gr.HTML(
        '<p class="note">h = W₀x + (alpha / r)BAx = (W₀ + (alpha / r)BA)x: kept apart or added up, the layer is the same. '
        "Merge and see how exactly; scale the update from nothing to twice itself; measure what each way costs.</p>"
    )
    buttons = [check, turn, time]
    busy = [gr.update(interactive=False)] * len(buttons)
    free = [gr.update(interactive=True)] * len(buttons)

    def doing(work: Any, said: str) -> Any:
        def run(key: str, text: str) -> Iterator[tuple]:
            yield "", f'<p class="note">{said}</p>', *busy
            try:
                for now in work(key, text):
                    yield gr.skip(), now, *busy
                yield gr.skip(), gr.skip(), *free
            except PeftlabError as error:
                yield escape(str(error)), "", *free

        return run

    def checking(key: str, text: str) -> Iterator[str]:
        yield merged_said(MERGE(key, text))

    def turning(key: str, text: str) -> Iterator[str]:
        stops: list[tuple[float, str]] = []
        for stop in DIAL(key, text):
            stops.append(stop)
            yield dialled(stops)

    def timing(key: str, text: str) -> Iterator[str]:
        for share, report in LATENCY(key, text):
            yield timed(report) if report else f'<p class="note">Timing, {words.score(share)} done.</p>'

    jobs = (
        (check, checking, "Reading the same text with four models: apart and merged, in fp32 and in bf16."),
        (turn, turning, "Answering five times."),
        (time, timing, "Loading the four models."),
    )
    for button, work, said in jobs:
        button.click(
            doing(work, said), [adapter, prompt], [problem, shown, *buttons], show_progress="hidden",
            concurrency_id="generate", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
    adapter.input(
        lambda key: task_of(of(key)).heldout[0].prompt,
        adapter,
        prompt,
        show_progress="hidden",
        api_visibility="private",
    )
    return adapter
