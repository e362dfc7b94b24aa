"""Tab 3, do it now: a small fine-tune that runs live, its loss and held-out metric moving as it learns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from demos.gpu import on_gpu
from demos.tab import Asked, Draw, Tab
from peftlab import RunSpec, adapters, count, figures, jobs, scores, tasks, words
from peftlab.bench import recorded_runs
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.catalog.presets import PRESETS
from peftlab.tasks import METRICS, TASKS
from peftlab.train import train

OWN = ("rank", "virtual_tokens", "bottleneck", "block_size", "train_norms")
"""Settings of some methods, next to the method; FOLDED are under More settings."""
FOLDED = ("lr_ratio", "alpha", "dropout", "target_modules")
TYPED = ("steps", "learning_rate", "batch_size", "quantization", "seed")
LARGEST = 2_000_000_000
"""Parameters of the largest model offered for a live run."""
MINE = 8
"""Adapters that a browser keeps, the newest."""
POLL = 0.5
"""Seconds between two looks at a run."""

TRAIN = on_gpu(train)  # at import, because a shared GPU wants to know its functions before the page is up

Events = Sequence[dict[str, Any]]


def runnable() -> list[tuple[str, str]]:
    """Models small enough to train while people watch."""
    return [
        (m.name, m.key)
        for m in MODELS.values()
        if m.is_causal and m.hub_id and (m.total_parameters or LARGEST) < LARGEST
    ]


def here(spec: RunSpec) -> RunSpec:
    """`spec` as it can run live: the model of the calculators may be far too large for that."""
    return spec if spec.model in dict(map(reversed, runnable())) else spec.but(model=DEFAULT)  # type: ignore[arg-type]


def status(events: Events) -> str:
    """Steps done, time left, and what is going on, with a bar."""
    last = events[-1] if events else {"type": "idle"}
    step = next((e for e in reversed(events) if e["type"] == "step"), None)
    start = next((e for e in events if e["type"] == "start"), None)
    steps = start["spec"]["steps"] if start else 1
    share = step["step"] / steps if step else 0.0
    what, left = "", ""
    if last["type"] == "progress":
        what = f"{last['what']}, {words.score(last['share'])}"
    elif last["type"] == "step":
        left = f"about {words.seconds(last['eta_seconds'])} of training left"
    elif last["type"] == "done" and last["steps"]:
        kept = "Stopped early; what it learned is kept." if last["stopped"] else "Done."
        speed = f"{words.significant(last['tokens_per_second'])} tokens/s, {words.gear(events)}"
        what = f"{kept} {words.seconds(last['seconds'])} in all, {speed}{_peak(last)}, on {last['device']}."
        share = last["steps"] / steps
    done = f"step {step['step']} of {steps}" if step else ("before the first step" if start else "")
    return (
        f'<div class="status"><span>{done}</span><span>{escape(what)}</span><span>{left}</span></div>'
        f'<div class="progress" role="progressbar" aria-label="training" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width:{100 * share:.1f}%"></div></div>'
    )


def answers(events: Events) -> str:
    """What the model says to a few held-out items: before, and at the last measurement."""
    measured = [e for e in events if e["type"] == "eval" and "examples" in e]
    if not measured:
        return ""
    first, last = measured[0], measured[-1]
    learned = last["step"] > 0

    def row(before: dict[str, Any], now: dict[str, Any]) -> str:
        said = f'<td class="said">{escape(now["text"])}<br>{_mark(now["score"])}</td>' if learned else ""
        return f'<tr><td>{escape(before["prompt"])}</td><td class="said">{escape(before["text"])}</td>{said}</tr>'

    rows = "".join(map(row, first["examples"], last["examples"]))
    after = f"<th>at step {last['step']}</th>" if learned else ""
    return (
        '<div class="wide"><table class="data answers"><tr><th>never seen in training</th><th>before</th>'
        f"{after}</tr>{rows}</table></div>"
    )


def _peak(done: dict[str, Any]) -> str:
    """Measured on a GPU; on a CPU nobody counts it."""
    peak, said = done["measured_peak_bytes"], done["predicted_peak_bytes"]
    beside = f" ({words.size(said)} predicted)" if said else ""
    return f", peak memory {words.size(peak)}{beside}" if peak else ""


def _mark(score: float) -> str:
    return '<span class="good">right</span>' if score else '<span class="bad">not yet</span>'


def card(task: str) -> str:
    t = TASKS[task]
    return f"<b>{escape(t.name)}.</b> {escape(t.teaches)} {len(t.train)} training rows, {len(t.heldout)} held out."


def charts(events: Events) -> dict[str, Any]:
    """The loss and the metric of a run so far, by panel."""
    start = next((e for e in events if e["type"] == "start"), None)
    steps = start["spec"]["steps"] if start else 40
    name = METRICS[start["metric"]].name if start else "Score"
    return {
        "loss": figures.themed(figures.loss_curve, events, steps),
        "metric": figures.themed(figures.metric_curve, events, steps, name),
    }


@lru_cache(maxsize=32)
def charts_of(job: jobs.Job, seen: int) -> dict[str, Any]:
    """The same of the first `seen` events of a job."""
    return charts(job.events[:seen])


def drawn(job: jobs.Job) -> dict[str, Any]:
    """The charts of a job: new ones only where there is a new point."""
    events = list(job.events)
    return charts_of(job, next((n for n in range(len(events), 0, -1) if events[n - 1]["type"] in ("step", "eval")), 0))


@lru_cache(maxsize=len(TASKS) + 8)
def recording(task: str) -> dict[str, Any]:
    """What stands here until there is a run of one's own: a recorded one of this task, fastest hardware first, by panel."""
    run = next((r for r in recorded_runs() if r["spec"]["task"] == task), None)
    if run is None:
        said = "The model learns while you watch."
        return {"sentence": said, "bar": "", "said": "", **charts([])}
    events, recorded = run["events"], scores.of_run(run)
    libraries = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    mark = page.how("measured", f"{run['hardware']}, {run['date']}, {libraries}. Command: {run['command']}")
    about = (
        f'<div class="status"><span>{mark} A recording, seed {recorded.spec["seed"]}: {recorded.settings()}, '
        f"{words.seconds(events[-1]['seconds'])} in all{_peak(events[-1])}.</span></div>"
        f'<div class="note">{page.explained(escape(scores.elsewhere(recorded)))}</div>'
    )
    sentence = f"Recorded on {escape(run['hardware'])}: {words.live_sentence(events)}"
    return {"sentence": sentence, "bar": about, "said": answers(events), **charts(events)}


INVITATION = '<div class="status"><span><b>Press Train to run it here.</b></span></div>'


def waiting(job: jobs.Job) -> str:
    """Of a run that has not begun: how many are before it, or what it is loading."""
    last, before = job.events[-1], jobs.ahead(job)
    what = f"Your run waits: {before} ahead of it" if last["type"] == "queued" and before else "Your run begins"
    if last["type"] == "loading":
        what = f"Your run begins: loading {escape(last['model'])}"
    return f'<div class="status"><span><b>{what}.</b></span></div>'


def has_begun(job: jobs.Job) -> bool:
    """Whether there is anything of its own to see: until then, the recording stays."""
    return job.over or any(event["type"] == "start" for event in job.events)


def shown(job: jobs.Job | None, task: str) -> dict[str, Any]:
    """What the panels of a run show, by name."""
    if job is None or not has_begun(job):
        old = recording(task)
        return old | {"bar": (waiting(job) if job else INVITATION) + old["bar"]}
    events = list(job.events)
    error = f'<div class="problem">{escape(events[-1]["message"])}</div>' if events[-1]["type"] == "error" else ""
    return {
        "sentence": words.live_sentence(events),
        "bar": error or page.explained(status(events)),
        "said": answers(events),
        **drawn(job),
    }


class Live(Tab):
    """A fine-tune that runs while people watch."""

    key, title = "live", "Live"
    choices = methods.PRESET

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}
        """By job: where its adapter is to be downloaded."""

    def build(self) -> None:
        with gr.Row(elem_classes="stage"):
            with page.controls():
                self._settings()
            with gr.Column(elem_classes="main"):
                self._pictures()

    def _settings(self) -> None:
        opening = here(page.OPENING)
        page.drawer_handle()
        self.control("task", gr.Radio(page.choices_of(TASKS), value=tasks.DEFAULT, label="Task"))
        self.panel("lesson", page.note(card(tasks.DEFAULT)))
        self.control("method", methods.method_choice("live", "lora", DEFAULT))
        self.panel("about", page.note(methods.method_card("lora", DEFAULT)))
        self._controls(methods.method_settings(opening, *OWN))
        self._controls({name: page.text(name) for name in ("steps", "learning_rate")})
        with gr.Accordion("More settings", open=False):
            self.control("model", page.choice("model", runnable(), DEFAULT))
            methods.presets(self, list(PRESETS))
            self._controls(methods.method_settings(opening, *FOLDED))
            self.control("batch_size", page.text("batch_size"))
            self.control("quantization", page.choice("quantization"))
            self.control("seed", page.text("seed"))
        self.panel("note", page.note())
        page.reset("model", "method", "task")

    def _controls(self, made: Mapping[str, Any]) -> None:
        for name, component in made.items():
            self.control(name, component)

    def _pictures(self) -> None:
        self.panel("sentence", page.sentence(""))
        with gr.Row(elem_classes="run-row"):
            go = self.panel("go", gr.Button("Train", variant="primary", scale=0, min_width=160))
            stop = self.panel("stop", gr.Button("Stop and keep", scale=0, min_width=190, interactive=False))
            keep = gr.DownloadButton("Download adapter", visible=False, scale=0, min_width=230)
            self.panel("keep", keep)
        self.panel("problem", page.problem())
        self.panel("bar", gr.HTML(min_height=44))
        with gr.Row(elem_classes="panes"):
            self.panel("loss", page.plot(None, "Training loss by step"))
            self.panel("metric", page.plot(None, "Held-out metric by step"))
        self.panel("said", gr.HTML())
        self.panel("how", gr.HTML())
        off = gr.update(interactive=False)
        self.press(go, self.train, ["kept"], busy={"go": off}, free={"go": gr.update(interactive=True)})
        self.press(stop, self.stop, ["kept", "stop"], busy={"stop": off})

    # --- presses

    def train(self, asked: Asked) -> Iterator[dict[str, Any]]:
        """Starts a run and tells the browser its id. Where one is under way, as after a double click, it is that one's."""
        owner = asked.kept.get("visitor") or ""
        job = jobs.running(owner)
        if job is None or job.trainer is not TRAIN:
            spec = here(asked.spec)
            count(spec)  # refuses what has nothing to train
            job = jobs.start(spec, owner, TRAIN)
        mine = [key for key in asked.kept.get("adapters") or () if key != job.id]
        yield {"kept": {"run": job.id, "adapters": [*mine, job.id][-MINE:]}, "go": gr.update(interactive=False)}

    def stop(self, asked: Asked) -> Iterator[dict[str, Any]]:
        """Asks the run on screen to end. Its picture says what came of it."""
        job = self.job(asked)
        if job:
            job.stop()
        yield {"kept": {"run": asked.kept.get("run")}}

    # --- pictures

    def job(self, asked: Asked) -> jobs.Job | None:
        return jobs.find(asked.kept.get("run"))

    def again(self, asked: Asked) -> float | None:
        job = self.job(asked)
        return POLL if job and not job.over else None

    def check(self, asked: Asked) -> None:
        count(here(asked.spec))

    def fill(self, asked: Asked) -> dict[str, Any]:
        spec = here(asked.spec)
        return {
            "task": spec.task or tasks.DEFAULT,
            "model": spec.model,
            "method": methods.method_value(spec.method, spec.model),
            "preset": methods.preset_shown(asked),
            **methods.method_updates(spec, (*OWN, *FOLDED)),
            **{name: page.blank(getattr(spec, name)) for name in TYPED},
        }

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec, job = here(asked.spec), self.job(asked)
        method, over = spec.method or "lora", job is None or job.over
        picture = shown(job, spec.task or tasks.DEFAULT)
        stopping = job is not None and job.stopping
        return {
            **{name: lambda name=name: picture[name] for name in picture},
            "go": lambda: gr.update(
                interactive=over, value="Training" if not over else "Train again" if job else "Train"
            ),
            "stop": lambda: gr.update(
                interactive=not over and not stopping, value="Stopping" if stopping else "Stop and keep"
            ),
            "keep": lambda: gr.update(value=(file := self.download(job)), visible=file is not None),
            "lesson": lambda: card(spec.task or tasks.DEFAULT),
            "about": lambda: methods.method_card(method, spec.model or DEFAULT),
            "how": lambda: methods.method_panel(method),
            "note": lambda: page.settings_line(spec),
        }

    def download(self, job: jobs.Job | None) -> Any:
        """The adapter of a run that is over, as a file that the page can fetch; None where there is none."""
        if job is None or not job.over or not (job.folder / "adapter").exists():
            return None
        if job.id not in self.files:
            file = self.panels["keep"].serve_static_file(adapters.pack(job.folder / "adapter"))
            self.files[job.id] = file | {"url": file["url"].lstrip("/")}
        return self.files[job.id]


if __name__ == "__main__":
    page.run_alone(Live())
