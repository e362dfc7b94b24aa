"""What a run costs, in tables: memory by kind, GPUs, room, time, money, disk, serving, conventions and measurements."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape

from .. import memory, units
from ..base import models
from ..base.models import MODELS
from ..catalog.gpus import GPU, GPUS
from ..errors import SpecError
from ..measured import documents
from ..memory import ClosedForm, Fit, MemoryReport
from ..memory.case import SYMBOLS
from ..memory.report import summary
from ..room import rooms
from ..spec import Resolved
from . import seconds
from .marks import bold, explained, how, libraries, sentence, small, table
from .memory_figures import COMPONENTS
from .settings import gpu_name, method_name

ROOM = ("t4", "l4", "rtx-4090", "a100-40gb", "h100-80gb", "h200")
"""The GPUs for which `room` answers what they hold."""


def numbers(full: MemoryReport, chosen: MemoryReport, form: ClosedForm | None) -> str:
    """Every component in bytes; and how each comes about, in symbols and in this run's numbers."""
    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    parts = [(r.peak.bytes if r.peak else vars(r)) for r in reports]
    rows = [
        (f'<span class="key {colour}"></span>{explained(name)}', *(units.size(part.get(kind, 0)) for part in parts))
        for kind, colour, name in COMPONENTS
        if any(part.get(kind) for part in parts)
    ]
    sums = {"allocated": "allocated at the peak", "reserved": "reserved by PyTorch", "process": "what nvidia-smi shows"}
    for key, name in (sums if full.peak else {"states": "sum"}).items():
        rows.append((name, *(bold(units.size(getattr(r, key))) for r in reports)))
    rows.append(("trained parameters", *(f"{r.trainable_parameters:,}" for r in reports)))
    return table(("", *map(method_name, reports)), rows) + (_derivation(form) if form else "")


def _derivation(form: ClosedForm) -> str:
    """Every component at the closed form's peak: its formula in symbols, with this run's numbers, and in bytes."""
    lines, spec = form.lines(), form.states.spec
    rows = []
    for line in lines:
        name = f'<span class="key {line.kind}"></span>{escape(line.name)}{small(line.note) if line.note else ""}'
        formula = f"<code>{escape(line.symbols)}</code><br><code>{escape(line.numbers)}</code>"
        rows.append((name, formula, units.size(form.value(line.size))))
    written = " ".join(line.symbols for line in lines)
    used = [symbol for symbol in SYMBOLS if re.search(rf"(?<![^\W\d]){symbol}(?!\w)", written)]
    known = ", ".join(f"{symbol}: {SYMBOLS[symbol]}" for symbol in used)
    run = f"B = {spec.batch_size}, S = {spec.sequence_length:,}, r = {spec.rank or 'none'}"
    legend = f'<p class="note">{run}; {escape(known)}. The bytes at the closed form’s peak, on one GPU.</p>'
    return legend + table(("component", "symbols, then numbers", "bytes"), rows, "derivation") + _between_gpus(form)


def _between_gpus(form: ClosedForm) -> str:
    """What several GPUs, or the CPU's memory, add; empty on one GPU."""
    if form.several is None:
        return ""
    spec = form.states.spec
    rows = [
        (f"buffer{small(b.source)}", f"<code>{escape(b.derivation)}</code>", units.size(form.value(b.size)))
        for b in form.several.buffers
    ]
    rows.append(("sent by each GPU in a step", "", units.size(form.value(form.several.sent))))
    if cpu := form.value(form.several.in_cpu):
        rows.append(("in the CPU's memory, for each GPU", "", units.size(cpu)))
    head = (f"each of {spec.n_gpus} GPUs, {spec.sharding}", "formula", "bytes")
    return table(head, rows, "derivation") + f'<p class="note">{escape(form.several.note)}</p>'


def gpus(full: MemoryReport, chosen: MemoryReport) -> str:
    """Each GPU of the catalogue: whether it holds the runs, and how many are needed where it does not."""

    def cell(fit: Fit) -> str:
        if fit.n_gpus == 1:
            said = "fits with checkpointing" if fit.checkpointed else f"fits, {units.percent(fit.share)} full"
            return f'<span class="good">{said}</span>'
        small = "too small" if fit.alone else "too small, even shared"
        said = f"needs {fit.n_gpus:,}" if fit.n_gpus else small
        return f'<span class="bad">{said}{" with checkpointing" if fit.checkpointed else ""}</span>'

    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    if chosen.unknown and not chosen.peak:
        return waiting(chosen)
    rows = [
        (gpu_name(fits[0].gpu), f"{fits[0].gpu.memory_gb:g} GB", *map(cell, fits))
        for fits in zip(*map(memory.gpu_grid, reports), strict=True)
    ]
    shared = "<p class='note'>Several GPUs share weights and states by FSDP, each with its own batch.</p>"
    return table(("GPU", "memory", *map(method_name, reports)), rows) + ("" if chosen.process is None else shared)


def waiting(chosen: MemoryReport) -> str:
    """Why nothing is said of GPUs yet, or ever of other runs than this one; empty where the closed form knows."""
    return f'<p class="note">{escape(sentence(chosen.unknown))}</p>' if chosen.unknown else ""


def room(form: ClosedForm) -> str:
    """The largest run that each of some GPUs holds, and the cheapest change for those that do not hold this one."""
    spec, rows = form.states.spec, []
    needed = form.report().needed
    for gpu in map(GPUS.__getitem__, ROOM):
        most = [memory.largest(form, name, gpu.memory_bytes) for name in ("batch_size", "sequence_length")]
        model = memory.largest_model(spec, gpu.memory_bytes)
        largest = escape(MODELS[model].name) if model else "none"
        change = "fits as it is" if needed <= gpu.memory_bytes else _cheapest(spec, gpu)
        rows.append((gpu_name(gpu), *(f"{n:,}" if n else "none" for n in most), largest, change))
    cheapest = "cheapest change that makes this run fit"
    heads = ("GPU", "largest batch", "longest sequence", "largest model of the catalogue", cheapest)
    return (
        f'<p class="note">Each with the other settings as they are: batch {spec.batch_size}, {spec.sequence_length:,} tokens. '
        f"{how('estimated', 'From the closed form; it keeps the allocator’s usual reserve.')}</p>"
        + table(heads, rows, "room")
    )


def _cheapest(spec: Resolved, gpu: GPU) -> str:
    """The cheapest change that makes a run fit, with the memory it then needs and what the change costs."""
    found = memory.cheapest_changes(spec, gpu.memory_bytes)
    if not found:
        return "none of ours: a smaller model or several GPUs"
    changes, changed = found
    words, cost = ", and ".join(c.words for c in changes), "; ".join(c.cost for c in changes)
    return f"{escape(words)}: {units.size(memory.predict(changed).process)}{small(cost)}"


def compute_and_disk(chosen: MemoryReport, tasks: int, streams: int, context: int, price: float) -> str:
    """Time and money of one run, bytes on disk for all tasks, and what serving them takes: a sentence each.

    `streams` answers are written at once, of `context` tokens each; `price` is that of an hour of the GPU.
    """
    said = ""
    for line in (
        lambda: seconds.time_and_money(chosen, price),
        lambda: storage_line(chosen, tasks),
        lambda: _serving(chosen.spec, tasks, streams, context),
    ):
        try:
            said += f"<p>{line()}</p>"
        except SpecError as error:
            said += f"<p>{escape(str(error))}</p>"
    return said


def _serving(spec: Resolved, tasks: int, streams: int, context: int) -> str:
    served = memory.serve(spec, tasks, streams, context)
    states = f"; the states that {served.stateful} layers keep come on top" if served.stateful else ""
    return (
        f"Serving {tasks} of them at once, {streams} answers of {context:,} tokens: "
        f"{bold(units.size(served.as_copies), 'frozen')} as full copies, or {bold(units.size(served.on_one_base), 'trained')} "
        f"with every adapter on one base. Keys and values take {units.size(served.cache)} of either{states}."
    )


def storage_line(chosen: MemoryReport, tasks: int) -> str:
    """What an adapted model for each of so many tasks takes on disk."""
    disk = memory.storage(chosen, tasks)
    copies = f"On disk, {tasks} task{'s' if tasks != 1 else ''}: {bold(units.size(disk.full), 'frozen')} as full copies"
    if chosen.spec.method == "full":
        return f"{copies}."
    return f"{copies}, or one base of {units.size(disk.base)} and {bold(units.size(disk.adapters), 'trained')} of adapters."


def conventions(reports: tuple[MemoryReport, MemoryReport]) -> str:
    """What each lecture's convention makes of the same run, beside the prediction."""
    full, chosen = reports
    given = None if chosen.spec.method == "full" or chosen.peak else chosen.trainable_parameters
    rows: list[Sequence[str]] = []
    for key, rule in memory.CONVENTIONS.items():
        counted = memory.predict(full.spec, key).states, memory.predict(chosen.spec, key, given).states
        rows.append((f"{escape(rule.name)}{small(f'{rule.note} {rule.source}')}", *map(units.size, counted)))
    if chosen.process is not None:
        predicted = (bold(units.size(r.process)) for r in reports)
        rows.append(("<b>predicted</b>, activations and overhead included", *predicted))
    return table(("convention", "full", method_name(chosen)), rows)


def measured() -> str:
    """What was trained here on a GPU, then every recorded step, beside what is predicted for it."""
    rows = []
    for spec, done in rooms.here().finished():
        seen, said = done["measured_peak_bytes"], done["predicted_peak_bytes"]
        if seen and said:
            off = f"{said / seen - 1:+.2%}"
            rows.append((_run(spec.to_dict(), done["device"]), units.size(said), units.size(seen), off))
    here = "<p>Trained here, the step that took most:</p>" + table(("run", "predicted", "measured", "off"), rows)
    return (here if rows else "") + _recorded() + seconds.recorded()


def _run(spec: Mapping[str, str], more: str) -> str:
    return f"{escape(models.find(spec['model']).name)}, {escape(spec['method'])}{small(more)}"


@lru_cache(maxsize=1)
def _recorded() -> str:
    """Every recorded step beside what is predicted for it, a table for each GPU."""
    parts = []
    for document in documents("memory"):
        found = summary(document)
        rows = []
        for row in found["rows"]:
            sizes, off = (row["predicted"], row["measured"]), (row["error"], row["reserved_error"])
            rows.append((_run(row["spec"], row["settings"]), *map(units.size, sizes), *(f"{e:+.2%}" for e in off)))
        tip = f"{document['date']}; {libraries(document['versions'])}; {document['command']}"
        mean, worst = bold(f"{found['mean']:.2%}"), bold(f"{found['worst']:+.2%}")
        parts.append(
            f"<p>{len(rows)} real training steps on {escape(document['hardware'])}, each in a fresh process: predicted bytes "
            f"are {mean} off on average and {worst} at worst. "
            f"{how('measured', tip)}</p>" + table(("run", "predicted", "measured", "off", "reserved, off"), rows)
        )
    return "".join(parts)
