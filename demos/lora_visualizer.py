"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

import sys
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import proving, real_weights
from demos.page import address, controls, lora_widget, store
from demos.page.tab import Asked, Draw, Slow, Tab
from peftlab import RunSpec, SpecError, count, resolve
from peftlab.base.models import MODELS, find
from peftlab.lectures import from_scratch
from peftlab.show import lora, settings, shapes, statements

LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=512),
}


class Lora(Tab):
    """The LoRA visualizer."""

    key, title = "lora", "LoRA"
    choices = {**real_weights.CHOICES, **proving.CHOICES}

    def settings(self) -> None:
        self.control("model", controls.model_choice(address.MODEL))
        lora_widget.knobs()
        self.panel("changed", controls.note())
        controls.reset("model", "task")

    def pictures(self) -> None:
        self.panel("problem", controls.problem())
        top = gr.HTML(None, html_template=lora_widget.TOP, js_on_load=lora_widget.SCRIPT, elem_classes="drawn")
        self.panel("picture", top)
        controls.lessons({name: address.link(spec) for name, spec in LESSONS.items()})
        gr.HTML(lora_widget.BELOW, js_on_load=None, elem_classes="drawn")
        self.fold_of("Four ways to change the forward pass", "flows")
        with self.fold("Percent against model size"):
            self.panel("by_size", controls.plot(None, "LoRA's trained percent by the size of the model"))
        with self.fold("The mathematics, on real weights"):
            real_weights.build(self)
        with self.fold("Proofs by doing"):
            proving.build(self)
        with self.fold("From scratch: the layer in plain torch"), gr.Row(elem_classes="panes"):
            with gr.Column():
                self.panel("code", _code("", "Runs as it is; its output equals peft's"))
            with gr.Column():
                _code(from_scratch.LECTURE, "Lecture 11.2's own, which raises when it merges")
        with self.fold("Why the lecture's merge_weights raises"):
            gr.Markdown(from_scratch.WHY)
        self.fold_of("The lectures' tables, recomputed", "tables")

    def check(self, asked: Asked) -> None:
        entry, shown = find(asked.run.model), MODELS[address.MODEL].name
        if entry.config is None:
            raise SpecError(
                f"model={entry.key}: a bare count has no matrices to draw; {shown} is shown, or choose a model"
            )
        count(resolve(shapes.of_family(asked.spec)))
        real_weights.check(asked)

    def fill(self, asked: Asked) -> dict[str, object]:
        own = {"model": controls.shown_model(asked.spec), "proof_prompt": proving.prompt(asked)}
        return {**super().fill(asked), **own, **real_weights.fill(asked)}

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec = asked.spec
        return {
            "picture": lambda: shapes.value(spec, asked.refused),
            "changed": lambda: settings.changed(spec),
            "flows": lambda: lora.flows(asked.run.model),
            "by_size": lambda: lora.by_size(spec),
            **real_weights.draw(asked),
            **proving.draw(asked),
            "code": lambda: lora.code(spec),
            "tables": lambda: statements.tab_table("lora").html + lora.notes(),
        }

    def slow(self, asked: Asked) -> list[Slow]:
        return real_weights.slow(asked)


def _code(text: str, label: str) -> gr.Code:
    return gr.Code(text, language="python", label=label, wrap_lines=True, interactive=False)


if __name__ == "__main__":
    store.run_alone(Lora())
