"""Tab 3, do it now: a small fine-tune that runs live, its loss and held-out metric moving as it learns."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.page import address, choice, controls, methods, served, store
from demos.page.gpu import on_job
from demos.page.tab import Asked, Tab, Values
from peftlab import RunSpec, SpecError, count, resolve
from peftlab.base.models import DEFAULT, MODELS
from peftlab.catalog import PRESETS
from peftlab.data import tasks
from peftlab.resolve import as_here, set_aside
from peftlab.room import host, jobs, quota, rooms
from peftlab.show import runs, settings
from peftlab.show.marks import remarks
from peftlab.show.methods import PUBLISHED, method_card, method_panel, method_value, preset_says
from peftlab.show.run_charts import HEIGHT, LOSS

OWN = ("rank", "virtual_tokens", "bottleneck", "block_size", "train_norms")
"""Settings of some methods whose controls stand next to the method."""
FOLDED = ("lr_ratio", "alpha", "dropout", "target_modules")
"""Settings of some methods whose controls are under More settings."""
APPLIED = """
element.addEventListener('click', ({target}) => {
  if (target.closest('[data-replace]')) document.getElementById('live-go').scrollIntoView({block: 'center'});
});
"""
"""Whoever takes a suggestion sees the button that begins it."""
LARGEST = 2_000_000_000  # parameters of the largest model offered for a live run
on_job("train")


def small() -> list[tuple[str, str]]:
    """Names and keys of the models that are small enough to train while people watch."""
    found = (m for m in MODELS.values() if m.is_causal and m.hub_id and (m.total_parameters or LARGEST) < LARGEST)
    return [(model.name, model.key) for model in found]


def runnable() -> list[tuple[str, str]]:
    """Names and keys of the models that the host has chosen, else of all small ones."""
    return [(MODELS[key].name, key) for key in host.settings().models] or small()


def here(spec: RunSpec) -> RunSpec:
    """`spec` as it can run live: what it cannot have is set aside."""
    offered = [key for _, key in runnable()]
    fit = set_aside(spec, offered)[0]
    return as_here(fit if (fit.model or DEFAULT) in offered else fit.but(model=offered[0]))


def note(spec: RunSpec) -> str:
    """What a live run with the settings of `spec` uses, and which of those that somebody chose are set aside."""
    _, reasons = set_aside(spec, [key for _, key in runnable()])
    if spec.model in (None, address.MODEL):  # which the page opens with
        reasons.pop("model", None)
    return settings.aside_said(spec, reasons) + settings.settings_line(here(spec))


def buttons(job: jobs.Job | None, start: str, under_way: str, once_more: str, stop: str) -> Values:
    """The buttons of a visitor's own `job`. The texts are those of `go` before, during and after it, and that of `stop`."""
    is_on = job is not None and not job.over
    stopping, cancelling = (job.stopping, job.cancelling) if job else (False, False)
    go = under_way if is_on else once_more if job else start
    return {
        "go": gr.update(interactive=not is_on, value=go, visible=rooms.here().settings.train),
        "stop": gr.update(
            interactive=is_on and not stopping, value="Stopping" if stopping and not cancelling else stop
        ),
        "cancel": gr.update(visible=is_on, interactive=not cancelling, value="Cancelling" if cancelling else "Cancel"),
        "resume": gr.update(visible=job is not None and job.resumable, interactive=True),
    }


def copies(job: jobs.Job) -> str:
    """A button that copies the address at which others watch the run, or see what came of it."""
    link = f"?tab={Live.key}&run={job.id}"
    return (
        f'<button type="button" class="small-button" data-copy="{escape(link)}">Copy link<i> to this run</i></button>'
    )


def own(job: jobs.Job | None, asked: Asked) -> jobs.Job | None:
    """The job where it is the visitor's own, who alone may stop it and fetch what it has learned."""
    return job if job and asked.visitor and job.owner == asked.visitor else None


class Live(Tab):
    """A fine-tune that runs while people watch."""

    key, title = "live", "Live"
    choices, clears = {**methods.PRESET, "run": choice.words("run", "", 200)}, methods.PRESET_CLEARS

    def settings(self) -> None:
        self.control("task", gr.Radio(controls.choices_of(tasks.TASKS), value=tasks.DEFAULT, label="Task"))
        self.panel("lesson", controls.note(runs.card(tasks.DEFAULT)))
        self.control("method", methods.method_choice("live", DEFAULT))
        self.panel("about", controls.note(method_card(address.METHOD, DEFAULT)))
        self.control_all(methods.method_settings(OWN))
        self.control_all({name: controls.setting(name) for name in ("steps", "learning_rate")})
        with gr.Accordion("More settings", open=False):
            self.control("model", controls.choice("model", small(), DEFAULT))
            presets = [("none", ""), *controls.choices_of(PRESETS)]
            self.control("preset", gr.Dropdown(presets, value="", label="Preset", info=PUBLISHED))
            self.control_all(methods.method_settings(FOLDED))
            self.control_all({name: controls.setting(name) for name in ("batch_size", "quantization", "seed")})
        self.panel("note", controls.note())
        controls.reset("model", "method", "task")

    def pictures(self) -> None:
        self.panel("sentence", controls.sentence())
        with gr.Row(elem_classes="run-row"):
            go = self.panel("go", gr.Button("Train", variant="primary", scale=0, min_width=160))
            stop = self.panel("stop", gr.Button("Stop and keep", scale=0, min_width=190, interactive=False))
            cancel = self.panel("cancel", gr.Button("Cancel", visible=False, scale=0, min_width=110))
            resume = self.panel("resume", gr.Button("Resume", visible=False, scale=0, min_width=130))
            self.panel("keep", gr.DownloadButton("Download adapter", visible=False, scale=0, min_width=230))
            self.panel("share", gr.HTML(visible=False, elem_classes="share", js_on_load=None))
        self.cost()
        self.panel("problem", controls.problem())
        self.panel("bar", gr.HTML(elem_classes="run-bar"))
        with gr.Row(elem_classes="panes"):
            self.panel("loss", controls.plot(None, "Training loss by step", LOSS, HEIGHT))
            self.panel("metric", controls.plot(None, "Held-out metric by step", "Held-out score, %", HEIGHT))
        self.panel("figures", gr.HTML())
        self.panel("card", gr.HTML(js_on_load=APPLIED))
        self.panel("said", gr.HTML())
        self.panel("how", gr.HTML())
        off = gr.update(interactive=False)
        on = gr.update(interactive=True)
        self.press([go.click], self.train, ["kept"], busy={"go": off}, free={"go": on}, begins=True)
        self.press([stop.click], self.stop, ["kept", "stop"], busy={"stop": off})
        self.press([cancel.click], self.cancel, ["kept"], busy={"cancel": off})
        self.press([resume.click], self.resume, ["kept"], busy={"resume": off}, begins=True)

    def train(self, asked: Asked) -> Iterator[Values]:
        """Starts a run and tells the browser its id. After a double click it is the run that is under way."""
        if (job := self.training(asked)) is None:
            spec = here(asked.spec)
            count(resolve(spec))  # refuses what has nothing to train
            try:
                job = rooms.here().start("train", {"spec": spec.to_dict()}, asked.visitor, asked.first)
            except SpecError:
                if (job := self.training(asked)) is None:  # else the other press of two was first
                    raise
        yield {"kept": {"run": job.id}, "go": gr.update(interactive=False)}

    def training(self, asked: Asked) -> jobs.Job | None:
        """The visitor's run that waits or is under way, and is not being cancelled."""
        job = rooms.here().running(asked.visitor)
        return job if job and job.kind == "train" and not job.cancelling else None

    def stop(self, asked: Asked) -> Iterator[Values]:
        """Asks the run on screen to end; then its picture says what it came to."""
        if job := self.mine(asked):
            job.stop()
        yield {"kept": {"run": asked.kept.get("run")}}

    def cancel(self, asked: Asked) -> Iterator[Values]:
        """Ends the run on screen and drops what it has learned."""
        if job := self.mine(asked):
            job.cancel()
        yield {"kept": {"run": asked.kept.get("run")}}

    def resume(self, asked: Asked) -> Iterator[Values]:
        """Lets the run on screen, which ended early, go on. After a double click it does so already."""
        job = self.mine(asked)
        if job is None:
            raise SpecError("this run is not yours, or not here any more; start one of your own")
        if job.over:
            rooms.here().resume(job)
        yield {"kept": {"run": job.id}}

    def job(self, asked: Asked) -> jobs.Job | None:
        """The run of a link, else the last one of this browser."""
        job = rooms.here().find(asked["run"] or asked.kept.get("run"))
        return job if job and job.kind == "train" and job.readable else None

    def lost(self, asked: Asked) -> str:
        """What is said where the run to be shown is not here, or cannot be shown."""
        wanted = asked["run"] or asked.kept.get("run")
        if not wanted or self.job(asked):
            return ""
        job, whose = rooms.here().find(wanted), "The run of this link" if asked["run"] else "Your last run"
        if job and not job.readable:
            return remarks(
                f"{whose} was made by another version of peftlab, with settings that this one does not have."
            )
        return served.gone(whose)

    def mine(self, asked: Asked) -> jobs.Job | None:
        return own(self.job(asked), asked)

    def follows(self, asked: Asked) -> str | None:
        return job.id if (job := self.job(asked)) else None

    def routes(self) -> list[Route]:
        follow = served.follow_route(self.key, "train", lambda job: runs.shown(job, job.spec))
        return [follow, served.adapters_route()]

    def check(self, asked: Asked) -> None:
        count(resolve(here(asked.spec)))

    def fill(self, asked: Asked) -> dict[str, object]:
        spec = here(asked.spec)
        run = resolve(spec)
        return {
            **super().fill(replace(asked, spec=spec)),
            "task": run.task,
            "model": gr.update(value=run.model, choices=runnable()),
            "method": method_value(run.method, run.model),
            "preset": gr.update(value=asked["preset"], info=preset_says(asked["preset"])),
            **methods.method_updates(spec, (*OWN, *FOLDED)),
        }

    def costs(self, asked: Asked) -> dict[str, quota.Asks]:
        return {"Train": quota.of_job("train", {"spec": here(asked.spec).to_dict()})}

    def draw(self, asked: Asked) -> Values:
        spec, job = here(asked.spec), self.job(asked)
        mine = own(job, asked)
        run = resolve(spec)
        shown = runs.shown(job, spec, mine is not None)
        return {
            **shown,
            "bar": f"{self.lost(asked)}{shown['bar']}",
            **buttons(mine, "Train", "Training", "Train again", "Stop and keep"),
            "share": controls.seen(copies(job) if job else None),
            "keep": lambda: controls.seen(served.download(mine) if mine else None),
            "lesson": lambda: runs.card(run.task),
            "about": lambda: method_card(run.method, run.model),
            "how": lambda: method_panel(run.method),
            "note": lambda: note(asked.spec),
        }


if __name__ == "__main__":
    store.run_alone(Live())
