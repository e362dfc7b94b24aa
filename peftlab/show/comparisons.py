"""Base and adapter side by side: their answers and scores, and proofs by doing: merged against apart, the dial, the time."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from .. import adapters, hardware, units
from ..compare import APART, BASE, MERGED, SERIAL, ComparisonReport, Reply
from ..data import tasks
from ..data.tasks import METRICS, Task
from ..race import scores
from ..room import jobs, rooms
from .figures import PALETTE, QUARTERS, blank, themed
from .marks import bold, explained, forgot, graded, how, libraries, table
from .refusals import failure

if TYPE_CHECKING:
    from ..compare import proofs

NAMES = {
    BASE: "base",
    APART: "adapter beside its weights",
    MERGED: "adapter merged into them",
    SERIAL: "serial adapter (Houlsby)",
}
"""What each way to serve an adapter is called on the page."""


def recorded_pair(report: ComparisonReport | None, prompt: str) -> tuple[str, str] | None:
    """What base and adapter said to a held-out prompt when the adapter was made; None where that was not recorded."""
    for exchange in report.exchanges if report else ():
        if exchange.prompt == prompt:
            base, adapted = exchange.replies
            return base.text.strip(), adapted.text.strip()
    return None


def reference(task: Task, prompt: str, source: str) -> str:
    """Where the answers on screen are from, what would be right, and what both models are told."""
    row = next((r for r in task.heldout if r.prompt == prompt), None)
    said = f"Reference: <code>{escape(row.answer)}</code>. " if row else ""
    return f"{escape(source)}. {said}Instruction to both: “{escape(task.instruction)}”"


def whence(adapter: adapters.Adapter) -> str:
    """What the recorded score was trained with, and why other tabs show another."""
    mark = how("measured", f"Saved {adapter.saved}. {adapter.result.get('device', '')}")
    recorded = scores.of_adapter(adapter)
    more = explained(escape(scores.elsewhere(recorded)))
    return f"{mark} Recorded on {escape(recorded.hardware)}: {recorded.settings()}. {more}"


def compare_sentence(report: ComparisonReport) -> str:
    """On how many items the last adapter is better than the base, and on how many worse, and how much it forgot."""
    adapted = [s for s in report.scores if s.model != BASE][-1]
    scores = [{r.model: r.score or 0 for r in e.replies} for e in report.exchanges]
    wins = sum(score[adapted.model] > score[BASE] for score in scores)
    losses = sum(score[adapted.model] < score[BASE] for score in scores)
    text = f"{bold('The adapter', 'trained')} wins {bold(str(wins))} of {len(scores)}, loses {bold(str(losses))}"
    change = adapted.forgetting
    if change is None:
        return f"{text}."
    if change <= 0:
        return f"{text}, and reads ordinary text no worse than before."
    worse = f"{units.significant(change, 2)} nats a token worse"
    return f"{text}, and on ordinary text is {worse}: it forgot {forgot(change)}."


def scored_value(report: ComparisonReport, task: Task) -> dict[str, object]:
    """What the panels of a score show, by name."""
    return {
        "sentence": explained(compare_sentence(report)),
        "chart": themed(score_bars, report, METRICS[task.metric].name),
        "every": _answers(report, task),
    }


def scoring(job: jobs.Job) -> dict[str, object]:
    """What the panels show of a scoring, by name: how far it is, and the report once it is there."""
    last = job.events[-1]
    if last["type"] == "done":
        mark = how("measured", f"{hardware.here().name}, {units.seconds(last['job_seconds'])}")
        report, task = ComparisonReport.from_dict(last["report"]), tasks.find(job.arguments["spec"]["task"])
        return scored_value(report, task) | {"whence": f"{mark} Measured here.", "measuring": ""}
    if last["type"] == "progress":
        return {"measuring": f"Scoring, {units.score(last['share'])}"}
    before = rooms.here().ahead(job)
    waits = f"The scoring waits: {before} ahead of it." if before else "Loading the model."
    return {"measuring": failure(job.events) or waits}


def _answers(report: ComparisonReport, task: Task) -> str:
    """Every held-out item: what both said, and whether it is right."""

    def said(reply: Reply) -> str:
        return f'<td class="said">{escape(reply.text.strip())}<br>{graded(reply.score)}</td>'

    rows = (f"<tr><td>{escape(e.prompt)}</td>{''.join(map(said, e.replies))}</tr>" for e in report.exchanges)
    tip = f"Right means: {METRICS[task.metric].meaning}. Greedy decoding, one batch."
    return table((f"prompt {how('measured', tip)}", "base", "adapter"), rows, "answers")


def score_bars(report: ComparisonReport, name: str, theme: str) -> go.Figure:
    """The metric of base and adapters, in percent with 95% intervals."""
    c = PALETTE[theme]
    scores = list(reversed(report.scores))
    labels = ["base model" if s.model == BASE else escape(s.model) for s in scores]
    title = f"{name} on {len(report.exchanges)} held-out items, %"
    figure = blank(theme, 60 + 80 * len(scores), bargap=0.55, title=title)
    figure.add_bar(
        y=labels, x=[100 * s.mean for s in scores], orientation="h",
        marker={"color": [c["frozen"] if s.model == BASE else c["trained"] for s in scores]},
        error_x={
            "type": "data", "symmetric": False, "color": c["muted"],
            "array": [100 * (s.high - s.mean) for s in scores],
            "arrayminus": [100 * (s.mean - s.low) for s in scores],
        },
        hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
    )  # fmt: skip
    for s, label in zip(scores, labels, strict=True):
        value = f"<b>{units.score(s.mean)}</b>"
        place = {"y": label, "showarrow": False, "xanchor": "left"}
        figure.add_annotation(place, x=100 * s.high, text=value, xshift=8, font={"size": 18})
        figure.add_annotation(place, x=0, text=label, yanchor="bottom", yshift=34)  # above, where a phone has room
    figure.update_xaxes(range=[0, 115], tickvals=QUARTERS)
    return figure.update_yaxes(showgrid=False, showticklabels=False, range=[-0.5, len(scores) - 0.2])


def merged_said(report: proofs.MergeReport) -> str:
    """How far merging moves the logits, in words, in a table, and token by token where it changes the likeliest."""
    whole, half = report.agreements
    said = (
        f"<p>The adapter moves a logit by up to <b>{units.significant(report.adapter_moves)}</b>. In fp32, merging moves one "
        f"by at most <b>{_two(whole.largest_difference)}</b> and changes {len(whole.flips)} of {whole.positions} likeliest "
        f"tokens. In bf16 it moves one by up to <b>{_two(half.largest_difference)}</b> and changes {len(half.flips)}, where "
        f"bf16 alone, unmerged, is off by {_two(half.apart_off)}.</p>"
    )
    differs = "largest logit difference, apart to merged"
    heads = ("", differs, "likeliest token differs", "apart, off fp32", "merged, off fp32")
    rows = []
    for a in report.agreements:
        most, apart, merged = map(_two, (a.largest_difference, a.apart_off, a.merged_off))
        rows.append((a.precision, most, f"{len(a.flips)} of {a.positions}", apart, merged))
    flips = "; ".join(
        f"token {f.position}: <code>{_quoted(f.apart)}</code> becomes <code>{_quoted(f.merged)}</code>, which trailed by "
        f"{_two(f.margin)}"
        for a in report.agreements
        for f in a.flips
    )
    return said + table(heads, rows) + (f'<p class="note">{flips}</p>' if flips else "")


def _two(value: float) -> str:
    return units.significant(value, 2)


def _quoted(token: str) -> str:
    """A token in quotes, so that one sees its blanks."""
    return escape(json.dumps(token, ensure_ascii=False), quote=False)


def dialled(stops: list[tuple[float, str]]) -> str:
    """The answer at each strength λ of the update."""
    known = {0.0: "the base", 1.0: "the adapter"}
    rows = (
        f"<tr><td>λ = {stop:g}<br><small>{known.get(stop, '')}</small></td>"
        f'<td class="said">{escape(text.strip())}</td></tr>'
        for stop, text in stops
    )
    return table(("W₀ + λΔW", "answer"), rows, "answers dial")


def timed(report: proofs.LatencyReport) -> str:
    """The time of a token in each way to serve an adapter, over the base's time."""
    base = report.speeds[0].seconds
    mark = how(
        "measured",
        f"{report.device}, {report.precision}, batch 1; medians of {report.rounds} rounds of {report.tokens} tokens, taken in "
        f"turn; in brackets the quartiles. {libraries(report.versions)}",
    )
    rows = []
    for s in report.speeds:
        ratio = f"<b>{s.ratio:.2f}×</b> <small>({s.lower / base:.2f} to {s.upper / base:.2f})</small>"
        added = f"{s.added_modules:,}", f"{s.added_parameters:,}"
        rows.append((NAMES[s.what], ratio, f"{1000 * s.seconds:.1f} ms", *added))
    return table((mark, "time a token over the base's", "a token", "modules added", "parameters added"), rows)
