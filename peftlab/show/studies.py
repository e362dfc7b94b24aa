"""What adapters did to the weights of the bundled model, in words: one matrix, its updates, and what these share."""

from __future__ import annotations

import json
from functools import lru_cache
from html import escape

from .. import adapters, units
from ..base.models import DEFAULT, MODELS
from ..compare import lowrank, study
from ..compare.study import MatrixStudy, Study
from ..data import tasks
from ..errors import SpecError
from . import sentences, study_figures
from .figures import Chart, themed
from .marks import how, table
from .methods import paper_link

YOURS = "yours"
SHOWN = ("ticket-lora-r8", "ticket-lora-r64", "ticket-full")
"""Bundled adapters of one task and the same matrices, each of its own seed: the smallest rank first, full fine-tuning last."""
SHARE = 0.9
"""The sentence compares how many directions keep this share of the energy."""
LOOK = (
    (
        "Spectrum", "W's curve rises slowly: no few directions hold it. The update's rises at once.",
        "energy(r) = Σᵢ₌₁ʳ σᵢ² / Σ σᵢ²", "lora", "section 7.2",
    ),
    (
        "Best rank r", "No matrix of rank r is nearer to W than its r largest singular directions.",
        "W_r = Σᵢ₌₁ʳ σᵢ uᵢ vᵢᵀ, with ‖W − W_r‖² = Σᵢ>ᵣ σᵢ²", "", "Eckart and Young (1936)",
    ),
    (
        "Shared subspace",
        "1 where the smaller subspace lies in the larger; two random ones of ℝⁿ share max(i, j) / n. Left singular vectors: "
        "what an update writes into, for B starts at zero, while two runs of one seed start from the same A.",
        "φ(i, j) = ‖Aᵢᵀ Bⱼ‖² / min(i, j)", "lora", "section 7.2, appendix G",
    ),
    (
        "Amplification",
        "How much louder the update is than W in the update's own directions; compare the factor for random ones.",
        "‖ΔW‖ / ‖Uᵀ W V‖, with U, V the top directions of ΔW", "lora", "section 7.3, table 7",
    ),
    (
        "Intruder dimensions",
        "Top directions of the tuned matrix that the base has nothing like: no singular vector within a cosine of 0.5.",
        "maxᵢ |cos(u′ⱼ, uᵢ)| < 0.5", "intruders", "section 3",
    ),
)  # fmt: skip
"""Each picture's name, what it shows, its formula, and the paper and section it follows."""


@lru_cache(maxsize=1)
def bundled() -> dict[str, Study]:
    """The studies of SHOWN, by the names they are shown by."""
    found = (Study.from_dict(json.loads((adapters.BUNDLED / name / study.FILE).read_text())) for name in SHOWN)
    return {
        "full fine-tuning" if s.method == "full" else f"LoRA, rank {max(m.delta.rank for m in s.matrices)}": s
        for s in found
    }


def studies(mine: Study | None) -> dict[str, Study]:
    """Every study by name, a visitor's own first."""
    return {**({YOURS: mine} if mine else {}), **bundled()}


def roles(mine: Study | None) -> list[str]:
    """Kinds of module that any study has a matrix of."""
    every = {**bundled(), **studies(mine)}  # the bundled ones first
    return list(dict.fromkeys(m.role for s in every.values() for m in s.matrices))


def about() -> str:
    """Which updates are shown, and how well each learned the task."""
    made = [adapters.read(adapters.BUNDLED / name) for name in SHOWN]
    task = tasks.find(made[0].spec.task or tasks.DEFAULT)
    said = ", ".join(
        f"{name} ({units.score(a.result['eval']['after'][task.metric])}, after {a.spec.steps:,} steps)"
        for name, a in zip(bundled(), made, strict=True)
    )
    return (
        f"{escape(MODELS[DEFAULT].name)}, its weights and what three runs on one task changed of them, each with the share of "
        f"{made[0].result['eval']['items']} held-out items that it then got right: {said}."
    )


def changed(mine: Study | None, role: str, layer: int) -> dict[str, MatrixStudy]:
    """What each study has of one matrix. Raises SpecError where none has it."""
    here = {name: m for name, s in studies(mine).items() for m in s.matrices if m.role == role and m.layer == layer}
    if not here:
        raise SpecError(f"matrix={role}: no studied adapter changes it in layer {layer}; try {roles(mine)[0]}")
    return here


def pictures(mine: Study | None, role: str, layer: int) -> dict[str, object]:
    """Sentence, four charts and a table for one matrix, of the bundled studies and a visitor's own, by panel."""
    here, every = changed(mine, role, layer), studies(mine)
    weight = next(iter(here.values())).weight
    deltas = {name: m.delta for name, m in here.items()}
    shared, said = _shared(here)
    return {
        "study": sentences.study_sentence(role, layer, weight, deltas, SHARE),
        "energy": themed(study_figures.energy, weight, deltas),
        "singular_values": themed(study_figures.singular_values, weight, deltas),
        "update_sizes": themed(study_figures.sizes, {name: every[name] for name in here}, role),
        "shared": shared,
        "shared_said": said,
        "matrix_table": _table(here, every, role),
    }


def _shared(here: dict[str, MatrixStudy]) -> tuple[dict[str, Chart] | None, str]:
    """What two updates share, as a chart and in words: the visitor's or the smallest, and the one after it."""
    kept = [(name, m.directions) for name, m in here.items() if m.directions]
    if len(kept) < 2:
        return None, ""
    (a, of_a), (b, of_b) = kept[:2]
    overlap = lowrank.overlap(of_a, of_b, "left")  # B starts at zero, and A may have started alike in both
    i, j = len(overlap.grid), len(overlap.grid[0])
    said = (
        f"What {escape(a)} and {escape(b)} write into: φ({i}, {j}) is "
        f"<b>{overlap.grid[-1][-1]:.2f}</b>; random subspaces of {overlap.n} dimensions would share {overlap.random(i, j):.3f}."
    )
    return themed(study_figures.shared, overlap, a, b), said


def _table(here: dict[str, MatrixStudy], every: dict[str, Study], role: str) -> str:
    """What each study finds of the matrix, a column for each."""

    def factor(value: float | None) -> str:
        return "none" if value is None else f"{units.significant(value)}×"

    matrices = here.values()
    alike = [[m.intruders for m in every[name].matrices if m.role == role] for name in here]
    rows = {
        "rank of ΔW": [f"{m.delta.rank}" for m in matrices],
        "‖ΔW‖ / ‖W‖": [units.percent(m.relative_size or 0) for m in matrices],
        "amplification": [factor(m.amplification.factor) for m in matrices],
        "amplification of random directions": [factor(m.amplification.factor_of_random) for m in matrices],
        "intruders among its top 10": [f"{len(m.intruders.directions)}" for m in matrices],
        "intruders in all layers": [f"{sum(len(i.directions) for i in layers)}" for layers in alike],
    }
    mark = how("exact", "From singular value decompositions of the real weights; python -m peftlab study makes them.")
    return table((mark, *map(escape, here)), [(name, *values) for name, values in rows.items()])


def look() -> str:
    """What each of these pictures shows, its formula and its source."""
    said = ""
    for name, shows, formula, paper, section in LOOK:
        source = f"{paper_link(paper)}, {section}" if paper else section
        said += f"<dt>{name}</dt><dd>{shows}<br><code>{escape(formula)}</code> <small>{source}</small></dd>"
    return f'<dl class="look">{said}</dl>'


@lru_cache(maxsize=1)
def telling() -> int:
    """The layer that the smallest adapter changes most, of the matrix that is shown first."""
    smallest = [m for m in next(iter(bundled().values())).matrices if m.role == roles(None)[0]]
    return max(smallest, key=lambda m: m.relative_size or 0).layer or 0
