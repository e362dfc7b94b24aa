"""The LoRA tab's mathematics on real weights: is W low-rank, is the update, and what do two updates share?"""

from collections.abc import Iterator
from functools import cache, lru_cache, partial
from pathlib import Path

import gradio as gr

from demos.page import choice, controls
from demos.page.adapter_choice import choices, chooser, of, offered
from demos.page.tab import ONE_AT_A_TIME, QUIET, Asked, Slow, Tab, Values, with_result
from peftlab import PeftlabError, adapters, resolve, units
from peftlab.adapters import Adapter
from peftlab.base import architecture, weights
from peftlab.compare import study
from peftlab.room import worker
from peftlab.show import studies as shown
from peftlab.show.studies import images, is_here

ADD = "Add it"
KEEP = 12  # directions of each update that its study keeps, to compare them with another's
PANELS = ("study", "energy", "singular_values", "update_sizes", "shared_said", "matrix_table")
LAST_LAYER, WIDTH = 29, 576
"""Of the model whose adapters are studied."""
CHOICES: dict[str, choice.Choice] = {
    "matrix": choice.one_of("matrix", None, architecture.ROLES),
    "layer": choice.number("layer", None, 0, LAST_LAYER),
    "directions": choice.number("directions", 64, 1, WIDTH),
}
"""Role and layer of the matrix that is shown, and how many directions of W its picture keeps."""
DECOMPOSING = '<p class="note">W is being decomposed.</p>'
NOT_HERE = '<p class="note">The base model is not here yet; the foot of the page says how far it is.</p>'


def studying(adapter: Adapter) -> Iterator[tuple[float, study.Study | None]]:
    """Studies an adapter, and keeps the study beside it. It is all arithmetic of 64-bit numbers, which a CPU does."""
    if found := study.recorded(adapter):
        yield 1.0, found
        return
    base = weights.load(resolve(adapter.spec.but(precision="fp32", gpu=None, quantization="none")), "cpu")
    for share, found in with_result(study.study(base, adapter, study.names(adapter), KEEP)):
        if found:
            (adapter.folder / study.FILE).write_text(found.to_json())
        yield share, found


def added(asked: Asked) -> study.Study | None:
    """The study of the adapter that the visitor chose, where there is one."""
    try:
        folder = of(asked, asked.kept.get("studied")).folder
        return _recorded(folder, (folder / study.FILE).stat().st_mtime)
    except (PeftlabError, OSError):
        return None


@lru_cache(maxsize=8)
def _recorded(folder: Path, written: float) -> study.Study | None:
    return study.recorded(adapters.read(folder))


def place(asked: Asked) -> tuple[str, int]:
    """Role and layer of the matrix that is shown."""
    layer = asked["layer"]
    return asked["matrix"] or shown.roles(added(asked))[0], shown.telling() if layer is None else layer


def build(tab: Tab) -> None:
    tab.panel("studied_runs", controls.note())
    with gr.Row(elem_classes="run-row"):
        tab.control("matrix", gr.Radio(shown.roles(None), label="Matrix"))
        tab.slider("layer", "Layer")
    tab.panel("study_problem", controls.problem())
    tab.panel("study", controls.note())
    with gr.Row(elem_classes="panes"):
        tab.panel("energy", controls.plot(None, "Energy kept by the first directions of W and of each update"))
        tab.panel("singular_values", controls.plot(None, "Singular values of W and of each update"))
    with gr.Row(elem_classes="panes"):
        tab.panel("update_sizes", controls.plot(None, "Size of each update by layer"))
        with gr.Column():
            tab.panel("shared", controls.plot(None, "What the subspaces of two updates share"))
            tab.panel("shared_said", controls.note())
    tab.panel("matrix_table", gr.HTML())
    with tab.fold("W as a picture, and its best approximation"):
        tab.slider("directions", "Directions kept")
        tab.panel("weight_pictures", gr.HTML(min_height=430))
    with gr.Row(elem_classes="run-row"):
        adapter = tab.panel("studied", chooser(None, "Another adapter"))
        add = tab.panel("add", gr.Button(ADD, scale=0, min_width=190))
    gr.HTML(shown.look())
    adapter.input(None, adapter, None, js="(studied) => { peftlab.keep({studied}); }", **QUIET)
    busy, free = ({"add": gr.update(value=said, interactive=said == ADD)} for said in ("Studying", ADD))
    tab.press([add.click], adding, ["add", "kept"], busy, free, "study_problem", **ONE_AT_A_TIME)


def check(asked: Asked) -> None:
    shown.changed(added(asked), *place(asked))


def fill(asked: Asked) -> Values:
    role, layer = place(asked)
    offered = [[name, name] for name in shown.roles(added(asked))]
    return {"matrix": gr.update(choices=offered, value=role), "layer": layer}


def draw(asked: Asked) -> Values:
    drawn = cache(lambda: shown.pictures(added(asked), *place(asked)))
    found = worker.known(images, *place(asked), asked["directions"])
    studied, on_offer = asked.kept.get("studied"), [key for _, key in choices(asked)]
    return {
        "studied_runs": shown.about,
        **{name: partial(lambda panel: drawn()[panel], name) for name in PANELS},
        "shared": lambda: controls.seen(drawn()["shared"]),
        "weight_pictures": lambda: found or DECOMPOSING if is_here() else NOT_HERE,
        "studied": lambda: offered(asked, studied if studied in on_offer else None),
    }


def slow(asked: Asked) -> list[Slow]:
    return [Slow(images, (*place(asked), asked["directions"]), "weight_pictures")] if is_here() else []


def adding(asked: Asked) -> Iterator[Values]:
    """Studies the adapter that was chosen; once the study lies beside it, it is drawn."""
    key = asked.kept.get("studied")
    if not key:
        raise PeftlabError("no adapter is chosen; choose one to add it to these")
    for share, found in studying(of(asked, key)):
        if found is None:
            yield {"add": gr.update(value=f"Studying, {units.score(share)}", interactive=False)}
    yield {"kept": {"studied": key}}
