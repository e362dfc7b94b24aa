"""Tab 4, did it work? The same prompt to the base and to the adapter, and the score of both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.live_finetune import own
from demos.page import choice, controls, served, store
from demos.page.adapter_choice import bundled, choices, chooser, of, offered, task_of
from demos.page.gpu import on_gpu, on_job
from demos.page.tab import ONE_AT_A_TIME, QUIET, Asked, Tab, Values
from peftlab import compare, units
from peftlab.adapters import Adapter
from peftlab.compare import Reply
from peftlab.data.tasks import Task
from peftlab.room import jobs, quota, rooms
from peftlab.show import comparisons

if TYPE_CHECKING:
    from peftlab.run.generate import Decoding

on_job("score")


def generate(adapter: Adapter, prompt: str, decoding: Decoding) -> Iterator[tuple[Reply, Reply]]:
    """The texts of the base and of the adapter so far, after each token of both."""
    base, models = compare.models_of([adapter])
    virtual = adapter.spec.virtual_tokens or 0
    ids = compare.prompt_tokens(base, task_of(adapter).instruction, prompt, decoding, virtual)
    for said in compare.side_by_side(base, models, ids, decoding):
        plain, adapted = said.values()
        yield plain, adapted


GENERATE = on_gpu(generate, lambda adapter, prompt, decoding: quota.of_answers(adapter.spec, decoding.max_new_tokens))


def chosen(asked: Asked) -> str:
    """The key of the adapter: the chosen one, else the last that this browser trained, else the first bundled one."""
    known = choices(asked)
    return str(asked["adapter"] or next((key for _, key in known), ""))


def prompt_of(asked: Asked, task: Task) -> str:
    return asked["prompt"] or task.heldout[0].prompt


class Compare(Tab):
    """The base and an adapter, side by side."""

    key, title = "compare", "Compare"
    choices = {
        "adapter": choice.words("adapter", "", 200),
        "prompt": choice.words("prompt"),
        "temperature": choice.number("temperature", 0, 0, 1.5, whole=False),
        "tokens": choice.number("tokens", 64, 8, 256),
        "decoding_seed": choice.number("decoding_seed", 0, 0, 2**31 - 1),
    }
    clears = {"adapter": ("prompt",)}

    def settings(self) -> None:
        self.control("adapter", chooser(next(iter(bundled()))))
        examples = self.panel("example", gr.Dropdown([], label="Held-out examples", info="Never seen in training"))
        examples.input(None, examples, None, js="(prompt) => { peftlab.write({prompt}); }", **QUIET)
        with gr.Accordion("Decoding, the same for both", open=True):
            self.slider("temperature", "Temperature", "0 takes the likeliest token", step=0.1)
            self.slider("tokens", "Longest answer, tokens", step=8)
            self.control("decoding_seed", gr.Number(0, precision=0, label="Seed"))

    def pictures(self) -> None:
        self.panel("sentence", controls.sentence())
        self.panel("whence", controls.note())
        self.panel("problem", controls.problem())
        prompt = self.control("prompt", gr.Textbox(label="Prompt", lines=2, max_lines=6))
        with gr.Row(elem_classes="run-row"):
            ask = self.panel("ask", gr.Button("Ask both", variant="primary", scale=0, min_width=160))
            self.panel("asking", controls.note())
        self.cost()
        with gr.Row(elem_classes="panes"):
            self.panel("left", _pane("Base model", "base"))
            self.panel("right", _pane("With the adapter", "adapted"))
        self.panel("said", controls.note())
        self.panel("chart", controls.plot(None, "The task's metric for base and adapter, with 95% intervals"))
        with gr.Row(elem_classes="lessons"):
            measure = self.panel("measure", gr.Button("Score all held-out items here", size="sm"))
            halt = self.panel("halt", gr.Button("Cancel", size="sm", visible=False, scale=0, min_width=110))
            self.panel("measuring", controls.note())
        self.fold_of("Every held-out answer", "every")
        busy = {"ask": gr.update(interactive=False), "asking": "Loading the model."}
        free = {"ask": gr.update(interactive=True), "asking": ""}
        self.press([ask.click, prompt.submit], self.ask, ["left", "right", "said"], busy, free, **ONE_AT_A_TIME)
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        self.press([measure.click], self.score, ["kept"], busy={"measure": off}, free={"measure": on}, begins=True)
        self.press([halt.click], self.halt, ["kept"], busy={"halt": off}, free={"halt": on})

    def ask(self, asked: Asked) -> Iterator[Values]:
        """Gives the prompt to both, and shows their answers token by token."""
        adapter = of(asked, chosen(asked))
        task = task_of(adapter)
        prompt = prompt_of(asked, task)
        from peftlab.run.generate import Decoding

        decoding = Decoding(asked["tokens"], asked["temperature"], seed=asked["decoding_seed"])
        yield {"left": "", "right": ""}
        source = ""
        for base, adapted in GENERATE(adapter, prompt, decoding):
            source = f"Base {units.seconds(base.seconds)}, adapter {units.seconds(adapted.seconds)}, just now"
            yield {"left": base.text.strip(), "right": adapted.text.strip(), "asking": ""}
        yield {"said": comparisons.reference(task, prompt, source)}

    def score(self, asked: Asked) -> Iterator[Values]:
        """Starts to give every held-out row to both. A second press finds the scoring that is under way."""
        job = rooms.here().running(asked.visitor)
        if job is None or job.kind != "score":
            key = chosen(asked)
            adapter = of(asked, key)
            spec = adapter.spec.to_dict() | {"task": task_of(adapter).key}
            arguments = {"spec": spec, "adapter": key, "folder": str(adapter.folder)}
            job = rooms.here().start("score", arguments, asked.visitor, asked.first)
        yield {"kept": {"scoring": job.id}}

    def halt(self, asked: Asked) -> Iterator[Values]:
        """Ends the scoring that is under way."""
        if job := self.scoring(asked):
            job.cancel()
            yield {"kept": {"scoring": job.id}}

    def scoring(self, asked: Asked) -> jobs.Job | None:
        """The scoring that was started from this browser, the one under way first."""
        running = rooms.here().running(asked.visitor)
        job = (
            running if running and running.kind == "score" else own(rooms.here().find(asked.kept.get("scoring")), asked)
        )
        return job if job and job.kind == "score" else None

    def job(self, asked: Asked) -> jobs.Job | None:
        """The scoring of the adapter on screen."""
        job = self.scoring(asked)
        return job if job and job.arguments["adapter"] == chosen(asked) else None

    def follows(self, asked: Asked) -> str | None:
        return job.id if (job := self.job(asked)) else None

    def routes(self) -> list[Route]:
        return [served.follow_route(self.key, "score", comparisons.scoring)]

    def check(self, asked: Asked) -> None:
        task_of(of(asked, chosen(asked)))

    def fill(self, asked: Asked) -> dict[str, object]:
        key = chosen(asked)
        prompt = prompt_of(asked, task_of(of(asked, key)))
        return {**super().fill(asked), "adapter": offered(asked, key), "prompt": prompt}

    def costs(self, asked: Asked) -> dict[str, quota.Asks]:
        adapter = of(asked, chosen(asked))
        spec = adapter.spec.but(task=task_of(adapter).key)
        score = quota.of_job("score", {"spec": spec.to_dict()})
        return {"Ask both": quota.of_answers(spec, asked["tokens"]), "Score": score}

    def draw(self, asked: Asked) -> Values:
        adapter = of(asked, chosen(asked))
        task, report = task_of(adapter), compare.recorded(adapter)
        prompt, rows = prompt_of(asked, task), [row.prompt for row in task.heldout]
        pair = comparisons.recorded_pair(report, prompt)
        source = "Recorded when the adapter was made" if pair else "Press Ask both"
        unscored = "This adapter has no recorded score: press Score to measure it."
        nothing = {"sentence": unscored, "chart": gr.update(value=None), "every": ""}
        examples = gr.update(choices=[[row, row] for row in rows], value=prompt if prompt in rows else None)
        scoring = self.scoring(asked)
        under_way = scoring is not None and not scoring.over
        shown = self.job(asked)
        return {
            **(comparisons.scored_value(report, task) if report else nothing),
            "whence": comparisons.whence(adapter) if report else "",
            "measuring": "Another adapter is being scored." if under_way and not shown else "",
            **(comparisons.scoring(shown) if shown else {}),
            "example": examples,
            "left": lambda: _said_to(prompt, pair and pair[0]),
            "right": lambda: _said_to(prompt, pair and pair[1]),
            "said": lambda: comparisons.reference(task, prompt, source),
            "measure": gr.update(value=f"Score all {len(rows)} held-out items here", interactive=not under_way),
            "halt": gr.update(visible=under_way),
        }


def _pane(label: str, kind: str) -> gr.Textbox:
    return gr.Textbox(label=label, lines=4, max_lines=12, interactive=False, elem_classes=f"pane {kind}")


def _said_to(prompt: str, text: str | None) -> Values:
    """What a pane shows of a prompt. It differs for every prompt, so that no answer to the last one stays."""
    return gr.update(value=text or "", placeholder=f"Press Ask both: “{prompt[:60]}”")


if __name__ == "__main__":
    store.run_alone(Compare())
