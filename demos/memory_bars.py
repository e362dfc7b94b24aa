"""The Memory tab's sentence and bars: drawn by the page from polynomials, so that a slider asks the server nothing."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from demos import page
from peftlab import MemoryReport, words
from peftlab.catalog.gpus import GPUS
from peftlab.figures import COMPONENTS
from peftlab.memory import ClosedForm
from peftlab.methods import METHODS

OVERHEAD = (("reserve", "overhead", "reserve"), ("context", "overhead", "CUDA context"))
SLIDERS = ("batch_size", "sequence_length", "rank")
SCRIPT = """
let at = props.value.at;
const evaluate = (terms) => terms.reduce((sum, [c, i, j, k]) => sum + c * at[0] ** i * at[1] ** j * at[2] ** k, 0);
const add = (kinds) => Object.values(kinds).reduce((a, b) => a + b, 0);
const isExact = (run) => run.exact && at.every((n, i) => n === props.value.at[i] || (i === 2 && !props.value.ranked));
const parts = (run) => {
  if (isExact(run)) return run.exact;
  if (!run.form) return run.states;
  const moments = run.form.moments.map((kinds) =>
    Object.fromEntries(Object.entries(kinds).map(([kind, terms]) => [kind, Math.max(0, evaluate(terms))])));
  const peak = moments.reduce((a, b) => add(b) > add(a) ? b : a);
  return {...peak, reserve: (run.form.reserve - 1) * add(peak), context: run.form.context};
};
const draw = () => {
  const {runs, gpus, words, kinds} = props.value;
  const each = runs.map(parts), totals = each.map(add), most = Math.max(...totals);
  const last = totals.length - 1, needed = totals[last];
  const gpu = gpus.find(([, bytes]) => needed <= bytes), largest = gpus[gpus.length - 1];
  const where = gpu ? fill(words.one, {...words, gpu: gpu[0]})
    : fill(words.several, {...words, n: Math.ceil(needed / largest[1]).toLocaleString('en-US'), gpu: largest[0]});
  const room = element.querySelector('.bars').clientWidth;
  const ratio = totals[0] / needed, sure = runs.every((run) => !run.form || isExact(run)), about = sure ? '' : 'about ';
  const begin = fill(words.full, {model: bold(props.value.model), full: about + bold(size(totals[0]))});
  const name = (run) => run.name.replace('{rank}', at[2]);
  element.querySelector('.sentence').innerHTML = begin + (last ? ' ' + fill(words.chosen, {
    method: bold(name(runs[last]), 'trained'), chosen: about + bold(size(needed), 'trained'),
    ratio: about + significant(Math.max(ratio, 1 / ratio)), less: ratio >= 1 ? 'less' : 'more',
    where: sure ? ', and ' + where : '',
  }) : sure ? ' ' + where[0].toUpperCase() + where.slice(1) + '.' : '');
  element.querySelector('.bars').innerHTML = runs.map((run, i) => {
    const pieces = kinds.filter(([kind]) => each[i][kind] > 0).map(([kind, colour, label]) => {
      const share = 100 * each[i][kind] / most;
      return `<span class="piece ${colour}" style="width:${share}%" title="${label}: ${size(each[i][kind])}">` +
        (share * room / 100 > 9 * label.length + 14 ? `<i>${label}</i>` : '') + '</span>';
    }).join('');
    const said = kinds.filter(([kind]) => each[i][kind] > 0).map(([kind, , label]) => `${label} ${size(each[i][kind])}`);
    return `<div class="bar"><div class="bar-name">${name(run)} <small>${run.note}</small><b>${size(totals[i])}</b></div>` +
      `<div class="pieces" role="img" aria-label="${name(run)}: ${said.join(', ')}">${pieces}</div></div>`;
  }).join('');
  const shown = new Map(kinds.filter(([kind]) => each.some((p) => p[kind] > 0)).map(([, colour, label]) => [colour, label]));
  element.querySelector('.legends').innerHTML = [...shown].map(([colour, label]) =>
    `<span class="legend"><span class="key ${colour}"></span>${colour === 'overhead' ? 'overhead' : label}</span>`).join('');
  const source = element.querySelector('.source');
  source.innerHTML = runs.every(isExact) ? props.value.exact : props.value.closed;
};
draw();
watch('value', () => { at = props.value.at; draw(); });
new ResizeObserver(draw).observe(element);
window.addEventListener('peftlab-written', ({detail}) => {
  at = SLIDERS.map((name, i) => +detail[name] || at[i]);
  draw();
});
"""
DRAW = page.script("words.js") + "\n" + SCRIPT.replace("SLIDERS", str(list(SLIDERS)))


def bars(value: dict[str, Any], sentence: str) -> gr.HTML:
    """The sentence and the bars, which follow the sliders while these move."""
    return gr.HTML(
        value,
        html_template=f'<h2 class="sentence" aria-live="polite">{sentence}</h2><div class="bars"></div>'
        '<div class="legends"></div><div class="note source"></div>',
        js_on_load=DRAW,
    )


def bars_value(
    reports: tuple[MemoryReport, ...],
    forms: tuple[ClosedForm | None, ...],
    at: tuple[int, int, int],
    share: float | None = None,
) -> dict[str, Any]:
    """What the page draws: full fine-tuning first, then the chosen method unless that is the same.

    Of a model that is only a number, `share` percent is trained.
    """
    if reports[-1].spec.method == "full":
        reports, forms = reports[:1], forms[:1]
    chosen = reports[-1]
    return {
        "at": at,
        "ranked": any(r.spec.rank for r in reports),
        "model": escape(chosen.model_name),
        "runs": [_run(r, f, share) for r, f in zip(reports, forms, strict=True)],
        "gpus": [[words.gpu_name(g), g.memory_bytes] for g in GPUS.values()],
        "words": words.SENTENCES | words.it(chosen),
        "kinds": [*COMPONENTS, *OVERHEAD],
        "closed": CLOSED if forms[-1] else _counted(chosen),
        "exact": _compared(reports, forms),
    }


CLOSED = page.how(
    "estimated",
    "A closed form: polynomials in batch, length and rank, worked out from what autograd keeps. The allocator's reserve is "
    "taken as usual. Once you pause, a trace of the whole step takes its place.",
) + page.explained(" at once, from the closed form. The exact figure follows when you pause.")


def _run(report: MemoryReport, form: ClosedForm | None, share: float | None) -> dict[str, Any]:
    exact = None
    if report.source == "trace" and report.peak and report.reserved:
        exact = {**report.peak.bytes, "reserve": report.reserved - report.peak.total, "context": report.context}
    spec = report.spec
    name = words.method_name(report)
    if share is not None and spec.method != "full":
        name = f"{METHODS[spec.method or ''].name}, {share:g}% trained"
    elif spec.rank:
        name = name.replace(f"rank {spec.rank}", "rank {rank}", 1)
    return {
        "name": escape(name),
        "note": page.explained(escape(", ".join(filter(None, (spec.precision, _base(report)))))) if form else "",
        "form": form.to_data() if form else None,
        "states": {k: getattr(report, k) for k in ("frozen_weights", "trainable_weights", "gradients", "optimizer")},
        "exact": exact,
    }


def _base(report: MemoryReport) -> str:
    quantization = report.spec.quantization
    return f"base in {quantization}" if quantization not in (None, "none") else ""


def _counted(report: MemoryReport) -> str:
    return "<b>Not in these bars:</b> activations, logits and the CUDA context. " + (
        "A bare count has no layers to predict them from."
        if report.convention == "exact"
        else "The convention leaves them out."
    )


def _compared(reports: tuple[MemoryReport, ...], forms: tuple[ClosedForm | None, ...]) -> str:
    chosen, form = reports[-1], forms[-1]
    if chosen.source != "trace" or form is None:
        return ""
    mark = page.how(
        "exact",
        "One training step traced on fake tensors, replayed through a model of PyTorch's allocator, every token predicted. "
        "Held against an H100 in assets/measured/memory-h100.json.",
    )
    estimate, needed, allocated = form.report(), chosen.process or 1, chosen.allocated or 1
    off, of_allocated = (estimate.process or 0) / needed - 1, (estimate.allocated or 0) / allocated - 1
    less = "less" if off < 0 else "more"
    differs = "said the same" if abs(off) < 5e-4 else f"said {abs(off):.1%} {less}"
    if abs(off - of_allocated) > 0.005:
        differs += f", {abs(of_allocated):.1%} off in what is allocated: it takes PyTorch's reserve as usual"
    said = page.explained(
        f"a traced step: {words.size(allocated)} allocated at the peak, {words.size(needed)} with PyTorch's reserve and the "
        f"CUDA context. The closed form {differs}."
    )
    return f"{mark} {said}"
