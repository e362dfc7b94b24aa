"""The LoRA tab's mathematics on real weights: is W low-rank, is the update, and what do two updates share?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr

from demos import page
from demos.adapter_choice import choices, of, task_of
from demos.gpu import on_gpu
from peftlab import PeftlabError, RunSpec, adapters, architecture, figures, lowrank, resolve, study, weights, words
from peftlab import study_figures as draw
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.catalog.papers import PAPERS
from peftlab.study import MatrixStudy, Study

YOURS, ADD = "yours", "Add it"
SHOWN = ("ticket-lora-r8", "ticket-lora-r64", "ticket-full")
"""Bundled, of one task and the same matrices, from other seeds: from the smallest rank to the full fine-tune."""
KEEP = 12
"""Directions kept of each update, to compare with another's."""
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


def roles(mine: Study | None) -> list[str]:
    """Kinds of module that any study has a matrix of."""
    studies = [*bundled().values(), *([mine] if mine else [])]
    return list(dict.fromkeys(m.role for s in studies for m in s.matrices))


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


def picture(mine: Study | None, role: str, layer: int) -> tuple:
    """Sentence, four charts and a table for one matrix, of the bundled studies and a visitor's own."""
    studies = {**({YOURS: mine} if mine else {}), **bundled()}
    here = {name: m for name, s in studies.items() for m in s.matrices if m.role == role and m.layer == layer}
    if not here:
        raise PeftlabError(f"no studied adapter changes the {role} of layer {layer}; choose another one")
    weight = next(iter(here.values())).weight
    deltas = {name: m.delta for name, m in here.items()}
    return (
        words.study_sentence(role, layer, weight, deltas, SHARE),
        figures.themed(draw.energy, weight, deltas),
        figures.themed(draw.singular_values, weight, deltas),
        figures.themed(draw.sizes, {name: studies[name] for name in here}, role),
        *_shared(here),
        _table(here, studies, role),
    )


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
    return figures.themed(draw.shared, overlap, a, b), said


def _table(here: dict[str, MatrixStudy], studies: dict[str, Study], role: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in here)

    def row(label: str, values: list[str]) -> str:
        return f"<tr><td>{label}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>"

    def factor(value: float | None) -> str:
        return "none" if value is None else f"{words.significant(value)}×"

    every = [[m for m in studies[name].matrices if m.role == role] for name in here]
    matrices = list(here.values())
    rows = [
        row("rank of ΔW", [f"{m.delta.rank}" for m in matrices]),
        row("‖ΔW‖ / ‖W‖", [words.percent(m.relative_size or 0) for m in matrices]),
        row("amplification", [factor(m.amplification.factor) for m in matrices]),
        row("amplification of random directions", [factor(m.amplification.factor_of_random) for m in matrices]),
        row("intruders among its top 10", [f"{len(m.intruders.directions)}" for m in matrices]),
        row("intruders in all layers", [f"{sum(len(m.intruders.directions) for m in all_)}" for all_ in every]),
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


@lru_cache(maxsize=8)
def _decomposed(role: str, layer: int) -> tuple[Any, lowrank.Factors]:
    """W of the bundled base, and its singular value decomposition."""
    base = weights.load(resolve(RunSpec(model=DEFAULT, precision="fp32")))
    kind = next(m for m in architecture.of(DEFAULT).linear() if m.role == role)
    name = next(name for number, name in kind.names() if number == layer)
    weight = base.model.get_submodule(name).weight.detach().float().cpu()
    return weight, lowrank.factors(weight)


def images(role: str, layer: int, rank: int) -> str:
    """W beside its best approximation of a rank, number for number."""
    weight, found = _decomposed(role, layer)
    rank = min(int(rank), len(found.s))
    near, off = lowrank.best(found, rank)
    limit = 3 * float(weight.std())
    colour = figures.PALETTE["light"]["frozen"]

    def shown(matrix: Any, text: str, said: str) -> str:
        return f'<figure><img src="{draw.picture(matrix, limit, colour)}" alt="{said}"><figcaption>{text}</figcaption></figure>'

    d_out, d_in = weight.shape
    return (
        '<div class="weight-pictures">'
        + shown(weight, f"<b>W</b>, {d_out} × {d_in}", f"{d_out} by {d_in} numbers without a visible pattern")
        + shown(
            near, f"<b>the nearest of rank {rank}</b>: off by {words.percent(off)} of ‖W‖",
            f"the nearest matrix of rank {rank}, which is off by {words.percent(off)}",
        )
        + "</div>"
    )  # fmt: skip


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


def build(first: str) -> gr.Dropdown:
    """Returns the choice of an adapter to add to the studied ones."""
    known = roles(None)
    smallest = [m for m in next(iter(bundled().values())).matrices if m.role == known[0]]
    telling = max(smallest, key=lambda m: m.relative_size or 0).layer or 0
    own = gr.State(None)
    start = picture(None, known[0], telling)
    gr.HTML(f"<p>{about()}</p>", elem_classes="note")
    with gr.Row(elem_classes="run-row"):
        role = gr.Radio(known, value=known[0], label="Matrix")
        layer = gr.Slider(0, len(smallest) - 1, telling, step=1, label="Layer")
    problem = page.problem()
    said = page.note(start[0])
    with gr.Row(elem_classes="panes"):
        kept = page.plot(start[1], "Energy kept by the first directions of W and of each update")
        values = page.plot(start[2], "Singular values of W and of each update")
    with gr.Row(elem_classes="panes"):
        size = page.plot(start[3], "Size of each update by layer")
        with gr.Column():
            shared = page.plot(start[4], "What the subspaces of two updates share")
            shared_said = page.note(start[5])
    table = gr.HTML(start[6])
    with gr.Accordion("W as a picture, and its best approximation", open=False) as pictures:
        rank = gr.Slider(1, 576, 64, step=1, label="Directions kept")
        shown = gr.HTML("")
    with gr.Row(elem_classes="run-row"):
        adapter = gr.Dropdown(
            choices([]), value=first, label="Another adapter", info="Trained here, or bundled with the app"
        )
        add = gr.Button(ADD, scale=0, min_width=190)
    gr.HTML(explained())
    drawn = [said, kept, values, size, shared, shared_said, table]
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

    def safely(work: Any, n: int) -> Any:
        def guarded(*args: Any) -> Any:
            try:
                return ("", *work(*args))
            except PeftlabError as error:
                return (escape(str(error)), *[gr.skip()] * n)

        return guarded

    gr.on([role.input, layer.input], safely(picture, len(drawn)), [own, role, layer], [problem, *drawn],
          trigger_mode="always_last", **quiet)  # fmt: skip
    gr.on(
        [pictures.expand, rank.release, role.input, layer.release],
        safely(lambda *at: (images(*at),), 1), [role, layer, rank], [problem, shown], trigger_mode="always_last", **quiet,
    )  # fmt: skip

    def join(key: str, role: str, layer: int) -> Iterator[tuple]:
        skips = [gr.skip()] * (2 + len(drawn))
        try:
            for share, found in WORK(key):
                if found is None:
                    yield "", gr.update(value=f"Studying, {words.score(share)}", interactive=False), *skips
                    continue
                changed = {m.role for m in found.matrices}
                role = role if role in changed else min(changed)
                yield (
                    "",
                    gr.update(value=ADD, interactive=True),
                    found,
                    gr.update(choices=roles(found), value=role),
                    *picture(found, role, layer),
                )
        except PeftlabError as error:
            yield escape(str(error)), gr.update(value=ADD, interactive=True), *skips

    add.click(join, [adapter, role, layer], [problem, add, own, role, *drawn], show_progress="hidden",
              concurrency_id="generate", concurrency_limit=1, api_visibility="private")  # fmt: skip
    return adapter
