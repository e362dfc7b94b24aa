"""Whether a statement of a lecture's table is so: each check counts, predicts or looks up, and has no number of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import units
from ..base import architecture
from ..base.models import find
from ..catalog.papers import PAPERS
from ..count import BYTES, count
from ..memory import predict, storage
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from . import evidence, published
from .claims import CLAIMS
from .guide import Cell, Finding

SAME = 1.05
"""Of two times: within so much they are the same."""
SMALL = 0.05
"""Of an adapter's file: what share of the 16-bit model's is still small."""
GPU_BYTES = 80e9
"""Of the GPUs that kiit-tutorial counts."""


def _claim(tab: str, source: str, says: str) -> Finding:
    """A number that `claims.json` has already."""
    claim = next(c for c in CLAIMS if (c.tab, c.source, c.says) == (tab, source, says))
    value = claim.computed()
    shown = {"bytes": units.size, "percent": lambda n: units.percent(n / 100)}.get(claim.unit, lambda n: f"{n:,.0f}")
    return Finding(f"{shown(value)}. {claim.why}", not claim.differs)


def _words(method: str, of: str, sentence: int = 0) -> Finding:
    """A sentence of what the registry says of a method."""
    text = getattr(METHODS[method].about, of).split(". ")[sentence]
    return Finding(f"{text.rstrip('.')}.", None)


def _family(method: str, wanted: str) -> Finding:
    about = METHODS[method].about
    return Finding(about.family + (", reparameterized" if about.reparameterized else ""), about.family == wanted)


def _paper(method: str, authors: str, year: int) -> Finding:
    papers = [PAPERS[key] for key in METHODS[method].about.papers]
    cited = next((p for p in papers if p.authors.startswith(authors) and p.year == year), None)
    return Finding((cited or papers[0]).citation, cited is not None)


def _merges(method: str, can: bool) -> Finding:
    return Finding(f"{METHODS[method].name} {evidence.merging(method)}", (METHODS[method].merge is not None) == can)


def _place(method: str, wanted: str) -> Finding:
    """Where a method's trained parts stand in the data's path: in series with the frozen ones, or in parallel."""
    drawing = METHODS[method].drawing
    places = {"series": drawing.main, "parallel": drawing.branch}
    found = [name for name, boxes in places.items() if any(box.startswith("*") for box in boxes)]
    return Finding(
        f"in {' and '.join(found)}: {METHODS[method].about.trains.split(': ')[0].split('. ')[0]}", found == [wanted]
    )


def _added_time(method: str, wanted: str) -> Finding:
    """`zero`, `slight` or `adds`: by the recorded times, and where there are none by whether the method folds away.

    Slight is less than a Houlsby adapter adds, which are what the lecture holds it against.
    """
    lines, way = evidence.race_lines(evidence.RACE), METHODS[method]
    line, adapters = lines.get(method), lines.get("houlsby")
    if line is None or line.apart is None:
        return Finding(way.about.inference, (way.merge is not None) == (wanted == "zero"))
    final = line.merged or line.apart
    slight = adapters is not None and adapters.apart is not None and final < adapters.apart
    return Finding(evidence.token_time(method), {"zero": final <= SAME, "adds": final > SAME, "slight": slight}[wanted])


def _file(method: str, model: str, below: Sequence[str] = ()) -> Finding:
    """Small is against the model; tiny, against the files of `below` on the same model."""
    report = count(resolve(RunSpec(model=model, method=method)))
    share = report.adapter_bytes / (report.total_parameters * BYTES["bf16"])
    others = [count(resolve(RunSpec(model=model, method=key))) for key in below]
    beside = "".join(f"; {r.method_name} {units.size(r.adapter_bytes)}" for r in others)
    small = all(report.adapter_bytes < r.adapter_bytes for r in others) if others else share < SMALL
    text = f"{units.size(report.adapter_bytes)} on {report.model_name}, {units.percent(share)} of its own 16-bit file{beside}"
    return Finding(text, small)


def _fewer(method: str, than: Sequence[str], model: str) -> Finding:
    """Trained parameters, against those of each of `than`."""
    mine, *others = (count(resolve(RunSpec(model=model, method=key))) for key in (method, *than))
    text = "; ".join(f"{r.method_name} {r.trainable_parameters:,}" for r in (mine, *others))
    return Finding(
        f"{text} on {mine.model_name}", all(mine.trainable_parameters < r.trainable_parameters for r in others)
    )


def _same(method: str, other: str, model: str) -> Finding:
    a, b = (count(resolve(RunSpec(model=model, method=key))).trainable_parameters for key in (method, other))
    return Finding(f"{a:,} and {b:,} on {find(model).name}", a == b)


def _extra(method: str, over: str, model: str) -> Finding:
    """What one trains more than the other, and whether that is one number for each output of the adapted maps."""
    mine, other = (count(resolve(RunSpec(model=model, method=key))) for key in (method, over))
    more = mine.trainable_parameters - other.trainable_parameters
    outputs = sum((m.d_out or 0) * m.adapted_layers for m in mine.modules)
    return Finding(
        f"{more:,} more than {other.method_name} on {mine.model_name}: one for each of {outputs:,} outputs",
        more == outputs,
    )


def _virtual(method: str, model: str, per_layer: bool) -> Finding:
    """Virtual tokens: vectors once at the input, or a key and a value in every layer."""
    report, shape = count(resolve(RunSpec(model=model, method=method))), architecture.of(model)
    tokens, f = report.spec.virtual_tokens, shape.facts
    sizes = (2, tokens, shape.n_layers, f.kv_heads * f.head_size) if per_layer else (tokens, shape.hidden_size)
    product = 1
    for size in sizes:
        product *= size
    said = " × ".join(f"{size:,}" for size in sizes)
    return Finding(
        f"{report.trainable_parameters:,} = {said} on {find(model).name}", report.trainable_parameters == product
    )


def _matrix(model: str, role: str, rank: int) -> Finding:
    """LoRA's numbers for one weight against 2·d·r, with d either of its sides."""
    module = architecture.of(model).targets(role)[0]
    found = rank * (module.d_in + module.d_out)
    sides = sorted({2 * d * rank for d in (module.d_in, module.d_out)})
    return Finding(
        f"{find(model).name}, {role}, rank {rank}: r(d + k) = {found:,}; 2·d·r gives {' or '.join(f'{n:,}' for n in sides)}",
        sides == [found],
    )


def _states(spec: Mapping[str, Any], convention: str, trainable: int | None = None) -> int:
    return predict(resolve(RunSpec.from_dict(spec)), convention, trainable).states


def _reduced(
    spec: Mapping[str, Any], than: Mapping[str, Any], convention: str, trainable: int | None = None
) -> Finding:
    """Weights, gradients and optimizer states of one run against another's: reduced is less than half."""
    mine, other = _states(spec, convention, trainable), _states(than, convention)
    return Finding(
        f"{units.size(mine)} of weights, gradients and optimizer states, against {units.size(other)}", 2 * mine < other
    )


def _gpus(spec: Mapping[str, Any], convention: str, least: int, most: int, trainable: int | None = None) -> Finding:
    n = -int(-_states(spec, convention, trainable) // GPU_BYTES)
    return Finding(
        f"{n} of {units.size(GPU_BYTES)} hold the weights, gradients and optimizer states", least <= n <= most
    )


def _all_tasks(spec: Mapping[str, Any], convention: str, trainable: int) -> Finding:
    """One base and its adapters against copies."""
    of = storage(predict(resolve(RunSpec.from_dict(spec)), convention, trainable), evidence.TASKS)
    one = of.base + of.adapters
    return Finding(
        f"{evidence.TASKS} tasks: {units.size(one)} with the one base, against {units.size(of.full)} of copies",
        one < of.full,
    )


def _cheaper(method: str, than: str, model: str) -> Finding:
    mine, other = evidence.predicted(*evidence.automatic(model, method, than))
    text = f"{evidence.needed(mine)} against {evidence.needed(other)} predicted for {mine.model_name}"
    return Finding(text, mine.needed < other.needed)


def _keeps_more() -> Finding:
    """Whether plain LoRA forgot less than full fine-tuning in the published runs."""
    return Finding(evidence.forgetting(""), published.plain().forgetting < published.full().forgetting)


def _in_registry(name: str) -> Finding:
    known = [m.name for m in METHODS.values()]
    near = ", ".join(n for n in known if n.startswith(name.rstrip("+")))
    return Finding(f"no paper defines {name}; there are {near}" if name not in known else name, name in known)


CHECKS: dict[str, Callable[..., Finding]] = {
    "claim": _claim,
    "words": _words,
    "family": _family,
    "paper": _paper,
    "merges": _merges,
    "place": _place,
    "time": _added_time,
    "file": _file,
    "fewer": _fewer,
    "same": _same,
    "extra": _extra,
    "virtual": _virtual,
    "matrix": _matrix,
    "reduced": _reduced,
    "gpus": _gpus,
    "all-tasks": _all_tasks,
    "cheaper": _cheaper,
    "keeps-more": _keeps_more,
    "registered": _in_registry,
}


def found(cell: Cell) -> Finding:
    """What is so here, of one statement."""
    finding = CHECKS[cell.check](**cell.given)
    return Finding(finding.text, not cell.differs, read=True) if finding.holds is None else finding
