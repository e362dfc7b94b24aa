"""The LoRA tab's mathematics on real weights: is W low-rank, is the update, and what do two updates share?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from demos import choice, page
from demos.adapter_choice import choices, of, task_of
from demos.gpu import on_gpu
from demos.tab import ONE_AT_A_TIME, QUIET, Asked, Draw, Slow, Tab
from demos.weight_pictures import images, is_here
from peftlab import (
    PeftlabError,
    SpecError,
    adapters,
    architecture,
    figures,
    lowrank,
    resolve,
    study,
    weights,
    words,
    worker,
)
from peftlab import study_figures as charts
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.catalog.papers import PAPERS
from peftlab.study import MatrixStudy, Study

YOURS, ADD = "yours", "Add it"
SHOWN = ("ticket-lora-r8", "ticket-lora-r64", "ticket-full")
"""Bundled, of one task and the same matrices, from other seeds: from the smallest rank to the full fine-tune."""
KEEP = 12
"""Directions kept of each update, to compare with another's."""
PANELS = ("study", "energy", "singular_values", "update_sizes", "shared", "shared_said", "matrix_table")
LAST_LAYER, WIDTH = 29, 576
"""Of the model that they are of."""
CHOICES = {
    "matrix": choice.one_of("matrix", None, architecture.ROLES),
    "layer": choice.number("layer", None, 0, LAST_LAYER),
    "directions": choice.number("directions", 64, 1, WIDTH),
}
"""Which matrix is shown, and how many directions of W its picture keeps."""
DECOMPOSING = '<p class="note">W is being decomposed.</p>'
NOT_HERE = '<p class="note">The base model is not here yet; the foot of the page says how far it is.</p>'
SHARE = 0.9
"""Of the energy: how many directions keep it is what the sentence compares."""
LOOK = (
    (
        "Spectrum",
        "W's curve rises slowly: no few directions hold it. The update's rises at once.",
        "energy(r) = Σᵢ₌₁ʳ σᵢ² / Σ σᵢ²",
        "lora", "section 7.2",
    ),
    (
        "Best rank r",
        "No matrix of rank r is nearer to W than its r largest singular directions.",
        "W_r = Σᵢ₌₁ʳ σᵢ uᵢ vᵢᵀ, with ‖W − W_r‖² = Σᵢ>ᵣ σᵢ²",
        "", "Eckart and Young (1936)",
    ),
    (
        "Shared subspace",
        "1 where the smaller subspace lies in the larger; two random ones of ℝⁿ share max(i, j) / n. Left singular vectors: "
        "what an update writes into, for B starts at zero, while two runs of one seed start from the same A.",
        "φ(i, j) = ‖Aᵢᵀ Bⱼ‖² / min(i, j)",
        "lora", "section 7.2, appendix G",
    ),
    (
        "Amplification",
        "How much louder the update is than W in the update's own directions; compare the factor for random ones.",
        "‖ΔW‖ / ‖Uᵀ W V‖, with U, V the top directions of ΔW",
        "lora", "section 7.3, table 7",
    ),
    (
        "Intruder dimensions",
        "Top directions of the tuned matrix that the base has nothing like: no singular vector within a cosine of 0.5.",
        "maxᵢ |cos(u′ⱼ, uᵢ)| < 0.5",
        "intruders", "section 3",
    ),
)  # fmt: skip


@lru_cache(maxsize=1)
def bundled() -> dict[str, Study]:
    """The studies of `SHOWN`, by the names they are shown by."""
    found = (Study.from_dict(json.loads((adapters.BUNDLED / name / study.FILE).read_text())) for name in SHOWN)
    return {_name(s): s for s in found}


def _name(of: Study) -> str:
    if of.method == "full":
        return "full fine-tuning"
    return f"LoRA, rank {max(m.delta.rank for m in of.matrices)}"


def studies(mine: Study | None) -> dict[str, Study]:
    """A visitor's own first."""
    return {**({YOURS: mine} if mine else {}), **bundled()}


def roles(mine: Study | None) -> list[str]:
    """Kinds of module that any study has a matrix of."""
    every = [*bundled().values(), *([mine] if mine else [])]
    return list(dict.fromkeys(m.role for s in every for m in s.matrices))


def about() -> str:
    """Which updates are shown, and how well each learned the task."""
    made = [adapters.read(adapters.BUNDLED / name) for name in SHOWN]
    task = task_of(made[0])
    said = ", ".join(
        f"{name} ({words.score(a.result['eval']['after'][task.metric])}, after {a.spec.steps:,} steps)"
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


def pictures(mine: Study | None, role: str, layer: int) -> dict[str, Any]:
    """Sentence, four charts and a table for one matrix, of the bundled studies and a visitor's own, by panel."""
    here = changed(mine, role, layer)
    weight = next(iter(here.values())).weight
    deltas = {name: m.delta for name, m in here.items()}
    shared, said = _shared(here)
    return {
        "study": words.study_sentence(role, layer, weight, deltas, SHARE),
        "energy": figures.themed(charts.energy, weight, deltas),
        "singular_values": figures.themed(charts.singular_values, weight, deltas),
        "update_sizes": figures.themed(charts.sizes, {name: studies(mine)[name] for name in here}, role),
        "shared": gr.update(value=shared, visible=shared is not None),
        "shared_said": said,
        "matrix_table": _table(here, studies(mine), role),
    }


def _shared(here: dict[str, MatrixStudy]) -> tuple[Any, str]:
    """The two updates that have most to say: the visitor's or the smallest, and the largest."""
    kept = {name: m.directions for name, m in here.items() if m.directions}
    if len(kept) < 2:
        return None, ""
    (a, of_a), (b, of_b) = list(kept.items())[:2]
    overlap = lowrank.overlap(of_a, of_b, "left")  # B starts at zero, and A may have started alike in both
    i, j = len(overlap.grid), len(overlap.grid[0])
    said = (
        f"What {escape(a)} and {escape(b)} write into: φ({i}, {j}) is "
        f"<b>{overlap.grid[-1][-1]:.2f}</b>; random subspaces of {overlap.n} dimensions would share {overlap.random(i, j):.3f}."
    )
    return figures.themed(charts.shared, overlap, a, b), said


def _table(here: dict[str, MatrixStudy], every: dict[str, Study], role: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in here)

    def row(label: str, values: list[str]) -> str:
        return f"<tr><td>{label}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>"

    def factor(value: float | None) -> str:
        return "none" if value is None else f"{words.significant(value)}×"

    alike = [[m for m in every[name].matrices if m.role == role] for name in here]
    matrices = list(here.values())
    rows = [
        row("rank of ΔW", [f"{m.delta.rank}" for m in matrices]),
        row("‖ΔW‖ / ‖W‖", [words.percent(m.relative_size or 0) for m in matrices]),
        row("amplification", [factor(m.amplification.factor) for m in matrices]),
        row("amplification of random directions", [factor(m.amplification.factor_of_random) for m in matrices]),
        row("intruders among its top 10", [f"{len(m.intruders.directions)}" for m in matrices]),
        row("intruders in all layers", [f"{sum(len(m.intruders.directions) for m in all_)}" for all_ in alike]),
    ]
    mark = page.how(
        "exact", "From singular value decompositions of the real weights; python -m peftlab study makes them."
    )
    return f'<div class="wide"><table class="data"><tr><th>{mark}</th>{head}</tr>{"".join(rows)}</table></div>'


def explained() -> str:
    def source(paper: str, section: str) -> str:
        return f'<a href="{PAPERS[paper].url}">{escape(PAPERS[paper].citation)}</a>, {section}' if paper else section

    return (
        '<dl class="look">'
        + "".join(
            f"<dt>{name}</dt><dd>{look}<br><code>{escape(formula)}</code> <small>{source(paper, section)}</small></dd>"
            for name, look, formula, paper, section in LOOK
        )
        + "</dl>"
    )


def work(key: str) -> Iterator[tuple[float, Study | None]]:
    """Studies an adapter, and keeps the study beside it."""
    adapter = of(key)
    if found := study.recorded(adapter):
        yield 1.0, found
        return
    base = weights.load(resolve(adapter.spec.but(precision="fp32", gpu=None, quantization="none")))
    doing = study.study(base, adapter, study.names(adapter), KEEP)
    while True:
        try:
            yield next(doing), None
        except StopIteration as finished:
            (adapter.folder / study.FILE).write_text(finished.value.to_json())
            yield 1.0, finished.value
            return


WORK = on_gpu(work)


def added(asked: Asked) -> Study | None:
    """The study of the adapter that the visitor chose, where there is one."""
    try:
        folder = of(asked.kept.get("studied")).folder
        return _recorded(folder, (folder / study.FILE).stat().st_mtime)
    except (PeftlabError, OSError):
        return None


@lru_cache(maxsize=8)
def _recorded(folder: Path, written: float) -> Study | None:
    return study.recorded(adapters.read(folder))


@lru_cache(maxsize=1)
def telling() -> int:
    """The layer that the smallest adapter changes most, of the matrix that is shown first."""
    smallest = [m for m in next(iter(bundled().values())).matrices if m.role == roles(None)[0]]
    return max(smallest, key=lambda m: m.relative_size or 0).layer or 0


def place(asked: Asked) -> tuple[str, int]:
    """Role and layer of the matrix that is shown."""
    layer = asked["layer"]
    return asked["matrix"] or roles(added(asked))[0], telling() if layer is None else layer


def build(tab: Tab) -> None:
    tab.panel("studied_runs", page.note())
    with gr.Row(elem_classes="run-row"):
        tab.control("matrix", gr.Radio(roles(None), label="Matrix"))
        tab.control("layer", gr.Slider(0, LAST_LAYER, step=1, label="Layer"))
    tab.panel("study_problem", page.problem())
    tab.panel("study", page.note())
    with gr.Row(elem_classes="panes"):
        tab.panel("energy", page.plot(None, "Energy kept by the first directions of W and of each update"))
        tab.panel("singular_values", page.plot(None, "Singular values of W and of each update"))
    with gr.Row(elem_classes="panes"):
        tab.panel("update_sizes", page.plot(None, "Size of each update by layer"))
        with gr.Column():
            tab.panel("shared", page.plot(None, "What the subspaces of two updates share"))
            tab.panel("shared_said", page.note())
    tab.panel("matrix_table", gr.HTML())
    with tab.fold("W as a picture, and its best approximation"):
        tab.control("directions", gr.Slider(1, WIDTH, CHOICES["directions"].usual, step=1, label="Directions kept"))
        tab.panel("weight_pictures", gr.HTML(min_height=430))
    with gr.Row(elem_classes="run-row"):
        about = {"label": "Another adapter", "info": "Trained here, or bundled with the app"}
        adapter = tab.panel("studied", gr.Dropdown(choices([]), value=None, **about))
        add = tab.panel("add", gr.Button(ADD, scale=0, min_width=190))
    gr.HTML(explained())
    adapter.input(None, adapter, None, js="(studied) => { peftlab.keep({studied}); }", **QUIET)
    busy, free = gr.update(value="Studying", interactive=False), gr.update(value=ADD, interactive=True)
    tab.press(add, adding, ["add", "kept"], {"add": busy}, {"add": free}, "study_problem", **ONE_AT_A_TIME)


def check(asked: Asked) -> None:
    changed(added(asked), *place(asked))


def fill(asked: Asked) -> dict[str, Any]:
    role, layer = place(asked)
    return {
        "matrix": gr.update(choices=[[name, name] for name in roles(added(asked))], value=role),
        "layer": layer,
        "directions": asked["directions"],
    }


def draw(asked: Asked) -> dict[str, Draw]:
    drawn = cache(lambda: pictures(added(asked), *place(asked)))
    found = worker.known(images, *place(asked), asked["directions"])
    return {
        "studied_runs": about,
        **{name: lambda name=name: drawn()[name] for name in PANELS},
        "weight_pictures": lambda: found or DECOMPOSING if is_here() else NOT_HERE,
        "studied": lambda: _offered(asked),
    }


def _offered(asked: Asked) -> dict[str, Any]:
    known = choices(asked.kept.get("adapters"))
    return gr.update(choices=known, value=next((key for _, key in known if key == asked.kept.get("studied")), None))


def slow(asked: Asked) -> list[Slow]:
    return [Slow(images, (*place(asked), asked["directions"]), "weight_pictures")] if is_here() else []


def adding(asked: Asked) -> Iterator[dict[str, Any]]:
    """Studies the adapter that was chosen; once the study lies beside it, it is drawn."""
    key = asked.kept.get("studied")
    if not key:
        raise PeftlabError("no adapter is chosen; choose one to add it to these")
    for share, found in WORK(key):
        if found is None:
            yield {"add": gr.update(value=f"Studying, {words.score(share)}", interactive=False)}
    yield {"kept": {"studied": key}}
