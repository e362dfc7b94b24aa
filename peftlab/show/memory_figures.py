"""What the Memory tab says and draws: its opening sentence, surprises, bars, and memory through one training step."""

from html import escape

from .. import units
from ..base import architecture
from ..catalog.gpus import GPUS
from ..memory import ClosedForm, MemoryReport, Moment
from .figures import PALETTE, Chart, look
from .marks import bold, explained, how, sentence
from .settings import gpu_name, method_name

COMPONENTS = (
    ("frozen_weights", "frozen", "frozen weights"),
    ("trainable_weights", "trained", "trained weights"),
    ("gradients", "gradients", "gradients"),
    ("optimizer", "optimizer", "optimizer states"),
    ("temporaries", "overhead", "temporaries"),
    ("activations", "activations", "activations"),
    ("logits", "logits", "logits"),
    ("communication", "overhead", "buffers between GPUs"),
    ("workspace", "overhead", "cuBLAS workspace"),
)
"""Each kind of allocated memory with its colour in the palette and its name."""
CLOSED = how(
    "estimated",
    "A closed form: polynomials in batch, length and rank, worked out from what autograd keeps. The allocator's reserve is "
    "taken as usual. Once you pause, a trace of the whole step takes its place.",
) + explained(" at once, from the closed form. The exact figure follows when you pause.")
SENTENCES = {
    "full": "Full fine-tuning of {model} needs {full}.",
    "chosen": "{method} needs {chosen}: {ratio}× {less}{where}.",
    "one": "{it} one {gpu}",
    "several": "{it_takes} {n} × {gpu}",
}
"""The parts of Memory's opening sentence. The page fills the same words on every move of a slider."""


def memory_sentence(full: MemoryReport, chosen: MemoryReport) -> str:
    """What full fine-tuning needs, what the chosen method needs, and, unless that is an estimate, which GPUs hold it."""
    estimated = chosen.peak is not None and chosen.source == "closed-form"  # the exact figure may name another GPU
    about = "about " if estimated else ""
    begin = SENTENCES["full"].format(model=bold(full.model_name), full=about + bold(units.size(full.needed)))
    where = "" if estimated else _where(chosen)
    if chosen.spec.method == "full":
        return begin + (f" {where[0].upper()}{where[1:]}." if where else "")
    ratio = full.needed / chosen.needed
    return f"{begin} " + SENTENCES["chosen"].format(
        method=bold(method_name(chosen), "trained"),
        chosen=about + bold(units.size(chosen.needed), "trained"),
        ratio=about + units.significant(max(ratio, 1 / ratio)),
        less="less" if ratio >= 1 else "more",
        where=f", and {where}" if where else "",
    )


ALONE = {"it": "these alone fit", "it_takes": "these alone take"}
"""What the sentence says of a run's states, where it cannot say it of the whole run."""


def it(report: MemoryReport) -> dict[str, str]:
    """What the sentence says of the run: that it fits as a whole, or that its states alone do."""
    return ALONE if report.process is None else {"it": "it fits", "it_takes": "it takes"}


def _where(report: MemoryReport) -> str:
    """The smallest GPU that holds the run, or how many of the largest one do."""
    *_, largest = GPUS.values()
    if one := next((g for g in GPUS.values() if report.needed <= g.memory_bytes), None):
        return SENTENCES["one"].format(**it(report), gpu=gpu_name(one))
    n = -(-report.needed // largest.memory_bytes)
    return SENTENCES["several"].format(**it(report), n=f"{n:,}", gpu=gpu_name(largest))


def left(report: MemoryReport) -> str:
    """What one may expect the method to train, or to quantize, and it does not; empty where there is nothing of the kind."""
    return f"<p>{escape(' '.join(report.left))}</p>" if report.left else ""


def memory_surprises(full: MemoryReport, chosen: MemoryReport) -> list[str]:
    """What a reader would not expect of these two predictions, the most surprising first; none where a convention counts."""
    peak, spec = chosen.peak, chosen.spec
    if full.peak is None or peak is None:
        return []
    logits, facts = peak.bytes["logits"], architecture.of(spec.model).facts
    batch = peak.bytes["activations"] + logits
    found = _against_full(full, chosen, full.peak, peak)
    if logits > 0.25 * peak.total:
        found.append(
            f"The logits alone take {units.size(logits)}: a number for each of {spec.batch_size * spec.sequence_length:,} "
            "tokens and every word of the vocabulary, in fp32, then its softmax, then its gradient."
        )
    if batch > 0.5 * peak.total:
        found.append(
            f"Activations and logits are {units.percent(batch / peak.total)} of the peak. They follow batch × length, not "
            "the number of trained parameters."
        )
    if spec.rank and spec.precision == "bf16" and spec.adapter_precision == "fp32" and not spec.gradient_checkpointing:
        found.append(
            "A frozen linear layer keeps nothing for the backward pass. An adapted one keeps its input a second time, cast "
            "to the adapter's fp32."
        )
    if facts.experts:
        each = f"All {facts.experts} experts of every layer weigh"
        found.append(f"{each}, though a token meets {facts.experts_per_token} of them.")
    if chosen.outside:
        paged = f"{units.size(chosen.outside)} of optimizer states are paged"
        found.append(f"{paged}: they move to the CPU when the GPU is full.")
    return found


def _against_full(full: MemoryReport, chosen: MemoryReport, a: Moment, b: Moment) -> list[str]:
    """That a method needs more at its peak `b` than full fine-tuning does at its peak `a`, or hardly less."""
    saved = full.gradients + full.optimizer - chosen.gradients - chosen.optimizer
    more = sum(b.bytes[kind] - a.bytes[kind] for kind in ("activations", "logits"))  # what follows the batch
    spared = more - (b.total - a.total)
    if chosen.spec.method == "full" or b.total <= 0.75 * a.total or (saved <= 0 and b.total <= a.total):
        return []
    if b.total <= a.total:
        return [
            f"{units.size(saved)} of gradients and optimizer states are gone, and memory is only "
            f"{units.percent(1 - b.total / a.total)} lower: the rest does not depend on how much is trained."
        ]
    reason = (
        f"at the peak it spares {units.size(spared)} of weights, gradients and optimizer states, and keeps "
        f"{units.size(more)} more for the backward pass."
        if spared > 0
        else f"it trains {chosen.trainable_parameters:,} numbers, beside a model of {chosen.total_parameters:,}."
    )
    return [f"{chosen.method_name} needs more memory than full fine-tuning here. The reason: {reason}"]


def bars_value(
    reports: tuple[MemoryReport, ...],
    forms: tuple[ClosedForm | None, ...],
    at: tuple[int, int, int],
    share: float | None = None,
) -> dict[str, object]:
    """What the page draws: full fine-tuning first, then the chosen method unless that is the same.

    `at` is the batch, the length and the rank. Of a model that is only a number, `share` percent is trained.
    """
    if reports[-1].spec.method == "full":
        reports, forms = reports[:1], forms[:1]
    chosen = reports[-1]
    bare = chosen.convention == "exact"
    why = "A bare count has no layers to predict them from." if bare else "The convention leaves them out."
    why = next((f"{escape(sentence(r.unknown))} It follows when you pause." for r in reports if r.unknown), why)
    return {
        "at": at,
        "ranked": any(r.spec.rank for r in reports),
        "model": escape(chosen.model_name),
        "runs": [_run(r, f, share) for r, f in zip(reports, forms, strict=True)],
        "gpus": [[gpu_name(g), g.memory_bytes] for g in GPUS.values()],
        "words": SENTENCES | it(chosen),
        "alone": ALONE,
        "kinds": [*COMPONENTS, ("reserve", "overhead", "reserve"), ("context", "overhead", "CUDA context")],
        "closed": CLOSED if forms[-1] else f"<b>Not in these bars:</b> activations, logits and the CUDA context. {why}",
        "exact": _compared(chosen, forms[-1]),
    }


def _run(report: MemoryReport, form: ClosedForm | None, share: float | None) -> dict[str, object]:
    """One bar: its name, its polynomials, its bytes where a convention counts, and those of a trace where there is one."""
    exact, spec = None, report.spec
    if report.source == "trace" and report.peak and report.reserved:
        exact = {**report.peak.bytes, "reserve": report.reserved - report.peak.total, "context": report.context}
    name = method_name(report)
    if share is not None and spec.method != "full":
        name += f", {share:g}% trained"
    elif spec.rank:
        name = name.replace(f"rank {spec.rank}", "rank {rank}", 1)  # the page fills it as the slider moves
    base = f", base in {spec.quantization}" if spec.quantization != "none" else ""
    return {
        "name": escape(name),
        "note": explained(spec.precision + base) if form or report.unknown else "",
        "form": form.to_data() if form else None,
        "states": {k: getattr(report, k) for k in ("frozen_weights", "trainable_weights", "gradients", "optimizer")},
        "exact": exact,
    }


def _compared(chosen: MemoryReport, form: ClosedForm | None) -> str:
    """A traced step beside what the closed form estimated; empty until there is one."""
    if chosen.source != "trace":
        return ""
    mark = how(
        "exact",
        "One training step traced on fake tensors, replayed through a model of PyTorch's allocator, every token predicted. "
        "Held against an H100 in assets/measured/memory-h100.json.",
    )
    estimate, needed = form.report().process if form else None, chosen.needed
    guess = "The closed form does not know this model."
    if estimate:
        same = abs(estimate / needed - 1) < 5e-4
        guess = f"The closed form had {'said the same' if same else f'estimated {units.size(estimate)}'}."
    said = explained(
        f"a traced step: {units.size(chosen.allocated)} allocated at the peak, {units.size(needed)} with PyTorch's reserve and "
        f"the CUDA context. {guess}"
    )
    return f"{mark} {said}"


def memory_timeline(report: MemoryReport, theme: str) -> Chart:
    """Allocated memory through one training step, stacked by kind, with the peak marked. The report must have moments.

    Every click on Memory draws it anew, so it is plain JSON: plotly's own objects take ten times as long.
    """
    wide = max(1.0, len(report.moments) / 16)  # the optimizer is one moment, and would be a hairline
    points = [(float(i), m) for i, m in enumerate(report.moments)]
    points += [(x + wide, m) for x, m in points[-1:] if m.phase == "optimizer"]
    end = points[-1][0]
    at, peak = max(points, key=lambda point: point[1].total)
    mark = {
        "x": at, "y": peak.total / 1e9, "text": f"<b>peak {units.size(peak.total)}</b><br>{_place(peak, report)}",
        "showarrow": True, "ax": 0, "ay": -34, "arrowcolor": PALETTE[theme]["text"],
        "xanchor": "right" if at > 0.8 * end else "left" if at < 0.2 * end else "center",
    }  # fmt: skip
    phases = list(dict.fromkeys(m.phase.split()[0] for m in report.moments))
    places = [[x for x, m in points if m.phase.startswith(phase)] for phase in phases]
    layout = {
        "template": {"layout": look(theme)}, "height": 320, "hovermode": "x unified", "annotations": [mark],
        "title": {"text": "Through one training step: allocated memory, GB"},
        "xaxis": {
            "tickvals": [(min(xs) + max(xs)) / 2 for xs in places], "ticktext": phases, "showgrid": False,
            "range": [0, end],
        },
        "yaxis": {"range": [0, 1.28 * peak.total / 1e9], "rangemode": "tozero"},
    }  # fmt: skip
    areas: list[Chart] = []
    for kind, colour, name in COMPONENTS:
        values = [m.bytes.get(kind, 0) for _, m in points]
        if any(values):
            areas.append({
                "type": "scatter", "mode": "lines", "stackgroup": "memory", "name": name,
                "fillcolor": PALETTE[theme][colour],
                "line": {"width": 0.5, "color": PALETTE[theme][colour], "shape": "linear"},
                "x": [x for x, _ in points], "y": [v / 1e9 for v in values],
                "customdata": [units.size(v) for v in values], "hovertemplate": "%{customdata}",
            })  # fmt: skip
    told = {"text": [_place(m, report) for _, m in points], "hovertemplate": "<b>%{text}</b><br>%{customdata}"}
    areas[0] |= told  # the lowest area also tells where in the step a point is
    return {"data": areas, "layout": layout}


def _place(moment: Moment, report: MemoryReport) -> str:
    """Where in a step a moment is: `forward, layer 3`. A closed form knows the phase only."""
    if report.source != "trace" or moment.phase == "optimizer":
        return moment.phase
    depth = max(m.part for m in report.moments)
    part = "embedding" if moment.part < 0 else "head and loss" if moment.part == depth else f"layer {moment.part + 1}"
    return f"{moment.phase}, {part}"
