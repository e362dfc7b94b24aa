"""What is said of a step's seconds: a run's time and money, and every recorded step beside what is predicted for it."""

from __future__ import annotations

from functools import lru_cache
from html import escape

from .. import catalog, units
from ..catalog.gpus import GPUS
from ..memory import MemoryReport
from ..memory.compute import compute
from ..memory.report import settings
from ..memory.seconds import fitted
from ..resolve import resolve
from .marks import bold, how, small, table
from .settings import gpu_name


def time_and_money(chosen: MemoryReport, price: float) -> str:
    """What a run reads and computes, how long it takes and what that costs, at the price of an hour of a GPU.

    Raises SpecError as `compute` does.
    """
    spec = chosen.spec
    run = compute(spec)
    reads = f"One run of {spec.steps} steps reads {run.tokens:,} tokens at {units.operations(run.per_token)} each"
    saved = compute(resolve(spec.but(method="full", quantization=None))).per_token / run.per_token - 1
    more = (
        f" Full fine-tuning computes {units.percent(saved)} more: frozen weights need no gradient." if saved > 0 else ""
    )
    if chosen.step_seconds is None:
        return f"{reads}. {_why_no_time(chosen)}{more}"
    took = chosen.step_seconds * spec.steps
    money = took / 3600 * run.n_gpus * price
    each = f"{bold(step_words(chosen.step_seconds))} a step, {bold(units.seconds(took))} and {bold(f'{money:,.2f}')} in all"
    between = ", what passes between the GPUs left out" if run.n_gpus > 1 else ""
    return f"{reads}: {each} on {gpu_name(GPUS[spec.gpu])}{between}, {how('estimated', within())}.{more}"


def _why_no_time(chosen: MemoryReport) -> str:
    """Why there are no seconds of a step."""
    gpu = GPUS.get(chosen.spec.gpu)
    if chosen.spec.offload != "none":
        return "How long a step with offloaded states takes is not predicted."
    if gpu and gpu.bf16_tflops is None:
        return f"{gpu.name} has no bf16, and its seconds are not predicted."
    return "How long that takes follows from the trace of its step, which a convention or a bare count does not have."


def step_words(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else units.seconds(seconds)


def within() -> str:
    """How far off predicted seconds are, in words."""
    found = fitted()
    host = f"; on another host with the same GPU an eager step took {found.elsewhere:.1f} times as long"
    return (
        f"a roofline for each operation of its trace, and what Python needs to launch it; {found.mean:.0%} off on average and "
        f"{found.worst:+.0%} at worst over {found.steps} steps on {' and '.join(found.hardware)}, each family predicted from "
        f"the others{host if found.elsewhere else ''}"
    )


@lru_cache(maxsize=1)
def recorded() -> str:
    """Every recorded step's seconds beside what is predicted for them from the other families' steps."""
    document = catalog.read("seconds")
    rows = []
    for row in document["rows"]:
        off = row["predicted"] / row["measured"] - 1
        own = small(f"{row['gear']}; {settings(row['spec'])}")
        words = f"{escape(row['name'])}, {escape(row['spec']['method'])}{own}"
        rows.append((words, step_words(row["predicted"]), step_words(row["measured"]), f"{off:+.0%}"))
    return f"<p>Seconds of {len(rows)} steps: {within()}.</p>" + table(("run", "predicted", "measured", "off"), rows)
