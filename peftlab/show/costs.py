"""What a run costs, in tables: memory by kind, GPUs, room, time, money, disk, serving, conventions and measurements."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from html import escape
from typing import Any

from .. import units
from ..base.models import MODELS
from ..catalog.gpus import GPUS
from ..errors import SpecError
from ..measured import documents
from ..memory import (
    CONVENTIONS,
    ClosedForm,
    Fit,
    MemoryReport,
    cheapest_changes,
    gpu_grid,
    largest,
    largest_model,
    predict,
    serve,
    storage,
)
from ..memory.case import SYMBOLS
from ..memory.compute import compute
from ..memory.measured import summary
from ..resolve import resolve
from ..room import jobs
from ..spec import RunSpec
from . import figures, sentences
from .marks import explained, how, libraries, table


def numbers(full: MemoryReport, chosen: MemoryReport, form: ClosedForm | None) -> str:
    """Every component in bytes; and how each comes about, in symbols and in this run's numbers."""
    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    parts = [(r.peak.bytes if r.peak else vars(r)) for r in reports]
    rows = [
        (f'<span class="key {colour}"></span>{explained(name)}', *(units.size(part.get(kind, 0)) for part in parts))
        for kind, colour, name in figures.COMPONENTS
        if any(part.get(kind) for part in parts)
    ]
    sums = (
        {"allocated": "allocated at the peak", "reserved": "reserved by PyTorch", "process": "what nvidia-smi shows"}
        if full.peak
        else {"states": "sum"}
    )
    rows += [(name, *(f"<b>{units.size(getattr(r, key))}</b>" for r in reports)) for key, name in sums.items()]
    rows.append(("trained parameters", *(f"{r.trainable_parameters:,}" for r in reports)))
    heads = ("", *(escape(sentences.method_name(r)) for r in reports))
    return table(heads, rows) + (derivation(form) if form else "")


def derivation(form: ClosedForm) -> str:
    """Every component at the closed form's peak: its formula in symbols, with this run's numbers, and in bytes."""
    rows = []
    for line in form.lines():
        note = f"<br><small>{escape(line.note)}</small>" if line.note else ""
        name = f'<span class="key {line.kind}"></span>{escape(line.name)}{note}'
        formula = f"<code>{escape(line.symbols)}</code><br><code>{escape(line.numbers)}</code>"
        rows.append((name, formula, units.size(form.value(line.size))))
    spec = form.states.spec
    run = f"B = {spec.batch_size}, S = {spec.sequence_length:,}, r = {spec.rank or 'none'}"
    written = " ".join(line.symbols for line in form.lines())
    known = ", ".join(
        f"{symbol}: {meaning}"
        for symbol, meaning in SYMBOLS.items()
        if re.search(rf"(?<![^\W\d]){symbol}(?!\w)", written)
    )
    legend = f'<p class="note">{run}; {escape(known)}. The bytes at the closed form’s peak, on one GPU.</p>'
    return legend + table(("component", "symbols, then numbers", "bytes"), rows, "derivation") + _between_gpus(form)


def _between_gpus(form: ClosedForm) -> str:
    """What several GPUs, or the CPU's memory, add."""
    if form.several is None:
        return ""
    spec, rows = form.states.spec, []
    for buffer in form.several.buffers:
        source = f"<br><small>{escape(buffer.source)}</small>"
        formula = f"<code>{escape(buffer.derivation)}</code>"
        rows.append((f"buffer{source}", formula, units.size(form.value(buffer.size))))
    sent, cpu = form.value(form.several.sent), form.value(form.several.in_cpu)
    rows.append(("sent by each GPU in a step", "", units.size(sent)))
    if cpu:
        rows.append(("in the CPU's memory, for each GPU", "", units.size(cpu)))
    head = (f"each of {spec.n_gpus} GPUs, {spec.sharding}", "formula", "bytes")
    return table(head, rows, "derivation") + f'<p class="note">{escape(form.several.note)}</p>'


def gpus(full: MemoryReport, chosen: MemoryReport) -> str:
    """Each GPU of the catalogue: whether it holds the runs, and how many are needed where it does not."""

    def cell(fit: Fit) -> str:
        if fit.n_gpus == 1:
            said = "fits with checkpointing" if fit.checkpointed else f"fits, {units.percent(fit.share)} full"
            return f'<span class="good">{said}</span>'
        said = f"needs {fit.n_gpus:,}" if fit.n_gpus else "too small, even shared"
        return f'<span class="bad">{said}{" with checkpointing" if fit.checkpointed else ""}</span>'

    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    rows = [
        (escape(sentences.gpu_name(fits[0].gpu)), f"{fits[0].gpu.memory_gb:g} GB", *(cell(f) for f in fits))
        for fits in zip(*(gpu_grid(r) for r in reports), strict=True)
    ]
    shared = "<p class='note'>Several GPUs share weights and states by FSDP, each with its own batch.</p>"
    heads = ("GPU", "memory", *(escape(sentences.method_name(r)) for r in reports))
    return table(heads, rows) + ("" if chosen.process is None else shared)


def room(form: ClosedForm) -> str:
    """The largest run that each of some GPUs holds, and the cheapest change for those that do not hold this one."""
    spec, rows = form.states.spec, []
    needed = form.report().process or 0
    for key in ("t4", "l4", "rtx-4090", "a100-40gb", "h100-80gb", "h200"):
        gpu = GPUS[key]
        batch, length = (largest(form, name, gpu.memory_bytes) for name in ("batch_size", "sequence_length"))
        model = largest_model(spec, gpu.memory_bytes)
        if needed <= gpu.memory_bytes:
            change = "fits as it is"
        elif found := cheapest_changes(spec, gpu.memory_bytes):
            changes, changed = found
            after = predict(changed).process
            cost = escape("; ".join(c.cost for c in changes))
            change = f"{escape(', and '.join(c.words for c in changes))}: {units.size(after)}<br><small>{cost}</small>"
        else:
            change = "none of ours: a smaller model or several GPUs"
        rows.append(
            (
                escape(sentences.gpu_name(gpu)),
                f"{batch:,}" if batch else "none",
                f"{length:,}" if length else "none",
                escape(MODELS[model].name) if model else "none",
                change,
            )
        )
    change = "cheapest change that makes this run fit"
    heads = ("GPU", "largest batch", "longest sequence", "largest model of the catalogue", change)
    return (
        f'<p class="note">Each with the other settings as they are: batch {spec.batch_size}, {spec.sequence_length:,} tokens. '
        f"{how('estimated', 'From the closed form; it keeps the allocator’s usual reserve.')}</p>"
        + table(heads, rows, "room")
    )


def compute_and_disk(
    chosen: MemoryReport, tasks: float, streams: float, context: float, price: float, utilisation: float
) -> str:
    """Time and money of one run, bytes on disk for all tasks, and what serving them takes: a sentence each."""
    spec, said = chosen.spec, []
    gpu = GPUS[spec.gpu or "h100-80gb"]
    try:
        run = compute(spec)
        hours = run.time(gpu.key, (utilisation or 0) / 100) / 3600
        money = run.money(gpu.key, (utilisation or 0) / 100, price or 0)
        saved = compute(resolve(spec.but(method="full", quantization=None))).per_token / run.per_token - 1
        said.append(
            f"One run of {spec.steps} steps reads {run.tokens:,} tokens at {units.operations(run.per_token)} each: "
            f"{sentences.bold(units.seconds(3600 * hours))} and {sentences.bold(format(money, ',.2f'))} "
            f"on {escape(sentences.gpu_name(gpu))} at {utilisation:g}% of its peak."
            + (f" Full fine-tuning computes {units.percent(saved)} more: frozen weights need no gradient." if saved > 0 else "")
        )  # fmt: skip
    except SpecError as error:
        said.append(escape(str(error)))
    said.append(storage_line(chosen, int(tasks or 1)))
    try:
        served = serve(spec, int(tasks or 1), int(streams or 1), int(context or 1))
        said.append(
            f"Serving {int(tasks or 1)} of them at once, {int(streams or 1)} answers of {int(context or 1):,} tokens: "
            f"{sentences.bold(units.size(served.as_copies), 'frozen')} as full copies, or "
            f"{sentences.bold(units.size(served.on_one_base), 'trained')} with every adapter on one base. "
            f"Keys and values take {units.size(served.cache)} of either."
        )
    except SpecError as error:
        said.append(escape(str(error)))
    return "".join(f"<p>{line}</p>" for line in said)


def storage_line(chosen: MemoryReport, tasks: int) -> str:
    """What an adapted model for each of so many tasks takes on disk."""
    disk = storage(chosen, tasks)
    many = f"{tasks} task{'s' if tasks != 1 else ''}"
    if chosen.spec.method == "full":
        return f"On disk, {many}: {sentences.bold(units.size(disk.full), 'frozen')} as full copies."
    return (
        f"On disk, {many}: {sentences.bold(units.size(disk.full), 'frozen')} as full copies, "
        f"or one base of {units.size(disk.base)} and "
        f"{sentences.bold(units.size(disk.adapters), 'trained')} of adapters."
    )


def conventions(spec: RunSpec, reports: tuple[MemoryReport, MemoryReport]) -> str:
    """What each lecture's convention makes of the same run, beside the prediction."""
    full, chosen = reports
    given = None if chosen.spec.method == "full" or chosen.peak else chosen.trainable_parameters
    rows: list[tuple[str, ...]] = [
        (
            f"{escape(rule.name)}<br><small>{escape(rule.note)} {escape(rule.source)}</small>",
            units.size(predict(full.spec, key).states),
            units.size(predict(chosen.spec, key, given).states),
        )
        for key, rule in CONVENTIONS.items()
    ]
    if chosen.process is not None:
        predicted = (f"<b>{units.size(r.process)}</b>" for r in reports)
        rows.append(("<b>predicted</b>, activations and overhead included", *predicted))
    return table(("convention", "full", escape(sentences.method_name(chosen))), rows)


def measured() -> str:
    """What was trained here on a GPU, then every recorded step, beside what is predicted for it."""
    rows = []
    for spec, done in jobs.finished():
        seen, said = done["measured_peak_bytes"], done["predicted_peak_bytes"]
        if seen and said:
            rows.append(
                (_run(spec.to_dict(), done["device"]), units.size(said), units.size(seen), f"{said / seen - 1:+.2%}")
            )
    here = "<p>Trained here, the step that took most:</p>" + table(("run", "predicted", "measured", "off"), rows)
    return (here if rows else "") + _recorded()


def _run(spec: Mapping[str, Any], more: str) -> str:
    return f"{escape(MODELS[spec['model']].name)}, {escape(spec['method'])}<br><small>{escape(more)}</small>"


@lru_cache(maxsize=1)
def _recorded() -> str:
    parts = []
    for document in documents("memory"):
        found = summary(document)
        rows = [
            (
                _run(row["spec"], row["settings"]),
                units.size(row["predicted"]),
                units.size(row["measured"]),
                f"{row['error']:+.2%}",
                f"{row['reserved_error']:+.2%}",
            )
            for row in found["rows"]
        ]
        tip = f"{document['date']}; {libraries(document['versions'])}; {document['command']}"
        mean, worst = (sentences.bold(format(found[key], form)) for key, form in (("mean", ".2%"), ("worst", "+.2%")))
        parts.append(
            f"<p>{len(rows)} real training steps on {escape(document['hardware'])}, each in a fresh process: predicted bytes "
            f"are {mean} off on average and {worst} at worst. "
            f"{how('measured', tip)}</p>" + table(("run", "predicted", "measured", "off", "reserved, off"), rows)
        )
    return "".join(parts)
