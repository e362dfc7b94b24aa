"""Tab 3, do it now: a small fine-tune that runs live, its loss and held-out metric moving as it learns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from demos.gpu import on_gpu
from peftlab import RunSpec, SpecError, adapters, count, figures, jobs, tasks, words
from peftlab.bench import recorded_runs
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.catalog.presets import PRESETS
from peftlab.resolve import with_preset
from peftlab.tasks import METRICS, TASKS
from peftlab.train import train

TAB = "live"
OWN = ("rank", "virtual_tokens", "bottleneck", "block_size", "train_norms")
"""Settings of some methods, next to the method; FOLDED are under More settings."""
FOLDED = ("lr_ratio", "alpha", "dropout", "target_modules")
FIELDS = ("task", "model", "method", *OWN, *FOLDED, "learning_rate", "steps", "batch_size", "quantization", "seed")
BY_METHOD = (*OWN, *FOLDED, "learning_rate", "quantization")
"""Controls that follow the method."""
LARGEST = 2_000_000_000
"""Parameters of the largest model offered for a live run."""

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


def explained(spec: RunSpec) -> tuple[str, str, str, str]:
    """In words: the task, what the method trains, the method in full, and the settings a run would have."""
    method = spec.method or "lora"
    return (
        card(spec.task or tasks.DEFAULT),
        methods.method_card(method, here(spec).model or DEFAULT),
        methods.method_panel(method),
        page.settings_line(spec),
    )


def charts(events: Events) -> tuple[dict[str, Any], dict[str, Any]]:
    start = next((e for e in events if e["type"] == "start"), None)
    steps = start["spec"]["steps"] if start else 40
    name = METRICS[start["metric"]].name if start else "Score"
    return figures.themed(figures.loss_curve, events, steps), figures.themed(figures.metric_curve, events, steps, name)


def recording(task: str) -> tuple[str, str, Any, Any, str]:
    """What stands here until the first live run: a recorded one of this task, fastest hardware first.

    Sentence, provenance, loss, metric and answers.
    """
    run = next((r for r in recorded_runs() if r["spec"]["task"] == task), None)
    if run is None:
        return "Press Train: the model learns while you watch.", "", *charts([]), ""
    events = run["events"]
    libraries = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    mark = page.how("measured", f"{run['hardware']}, {run['date']}, {libraries}. Command: {run['command']}")
    about = (
        f'<div class="status"><span>{mark} Recorded on {escape(run["hardware"])}: '
        f"{words.seconds(events[-1]['seconds'])} in all{_peak(events[-1])}. "
        "Press Train to run it here.</span></div>"
    )
    return words.live_sentence(events), about, *charts(events), answers(events)


def build(spec: gr.State, mine: gr.BrowserState, current: gr.BrowserState) -> page.View:
    changing = partial(page.changing, TAB)
    first = recording(tasks.DEFAULT)
    sentence = page.sentence(first[0])
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            task = gr.Radio(page.choices_of(TASKS), value=tasks.DEFAULT, label="Task")
            lesson = page.note(card(tasks.DEFAULT))
            method = methods.method_choice("lora", DEFAULT)
            about = page.note(methods.method_card("lora", DEFAULT))
            own = methods.method_settings(page.OPENING, *OWN)
            steps = page.text("steps")
            learning_rate = page.text("learning_rate")
            with gr.Accordion("More settings", open=False):
                model = page.choice("model", runnable(), DEFAULT)
                preset = methods.preset_choice(list(PRESETS))
                folded = methods.method_settings(page.OPENING, *FOLDED)
                batch_size = page.text("batch_size")
                quantization = page.choice("quantization")
                seed = page.text("seed")
            note = page.note(page.settings_line(here(page.OPENING)))
            reset = gr.Button("Reset to automatic", size="sm")
        with gr.Column(elem_classes="main"):
            with gr.Row(elem_classes="run-row"):
                go = gr.Button("Train", variant="primary", scale=0, min_width=160)
                stop = gr.Button("Stop and keep", scale=0, min_width=190, interactive=False)
                keep = gr.DownloadButton("Download adapter", visible=False, scale=0, min_width=230)
            problem = page.problem()
            bar = gr.HTML(first[1], min_height=44)
            with gr.Row(elem_classes="panes"):
                loss = page.plot(first[2], "Training loss by step")
                metric = page.plot(first[3], "Held-out metric by step")
            said = gr.HTML(first[4])
            panel = gr.HTML(methods.method_panel("lora"))
    fields = [task, model, method, *own, *folded, learning_rate, steps, batch_size, quantization, seed]
    follows = [*own, *folded, learning_rate, quantization]
    live = [problem, sentence, bar, loss, metric, said, go, stop, keep]

    def update(spec: RunSpec, *values: Any) -> tuple:
        before = here(spec)
        chosen, moved = methods.edit(before, FIELDS, values)
        count(chosen)  # refuses what has nothing to train
        return (
            chosen,
            *explained(chosen),
            methods.method_value(chosen.method, chosen.model) if chosen.model != before.model else gr.skip(),
            *methods.method_updates(chosen, BY_METHOD, refill=moved),
        )

    def use_preset(spec: RunSpec, key: str, *values: Any) -> tuple:
        chosen, _ = methods.edit(here(spec), FIELDS, values)
        chosen = with_preset(chosen, PRESETS[key]) if key else chosen
        return (chosen, methods.preset_says(key), *show(chosen))

    def follow(job: jobs.Job | None) -> Iterator[tuple]:
        """A job's picture, again each time something happened."""
        if job is None:
            yield (gr.skip(),) * len(live)
            return
        drawn = -1
        for events in job.follow():
            points = sum(e["type"] in ("step", "eval") for e in events)
            begun = any(e["type"] == "start" for e in events)  # until then, the recorded run stays on screen
            lines = charts(events) if begun and points != drawn else (gr.skip(), gr.skip())
            over = events[-1]["type"] in ("done", "error")
            error = escape(events[-1]["message"]) if events[-1]["type"] == "error" else ""
            drawn = points if begun else drawn
            pack = _zip(job) if over else None
            yield (
                error if over else gr.skip(),  # a refused second press stays readable meanwhile
                words.live_sentence(events),
                status(events),
                *lines,
                answers(events) if begun else gr.skip(),
                gr.update(interactive=over, value="Train again" if over else "Training"),
                gr.update(interactive=not over),
                gr.update(value=pack, visible=pack is not None),
            )

    def begin(spec: RunSpec, mine: list[str], request: gr.Request, *values: Any) -> Iterator[tuple]:
        try:
            chosen, _ = methods.edit(here(spec), FIELDS, values)
            count(chosen)
            job = jobs.start(chosen, request.session_hash or "", TRAIN)
        except SpecError as error:
            yield (gr.skip(), gr.skip(), gr.skip(), escape(str(error)), *[gr.skip()] * (len(live) - 1))
            return
        page.visitor(request).made(chosen, [TAB])
        started: tuple = (chosen, job.id, [*[i for i in mine if i != job.id], job.id][-8:])
        for picture in follow(job):
            yield *started, *picture
            started = (gr.skip(),) * 3  # what is set on another tab while this runs stays set

    def again(run: str) -> Iterator[tuple]:
        """A page that comes back finds its run where it is."""
        yield from follow(jobs.find(run))

    def halt(run: str, request: gr.Request) -> Any:
        job = jobs.running(request.session_hash or "") or jobs.find(run)
        if job is None or job.over:
            return gr.skip()
        job.stop()
        return gr.update(interactive=False, value="Stopping")

    gr.on(
        [control.input for control in fields],
        changing(page.refusing(update, 6 + len(follows))),
        [spec, *fields],
        [problem, spec, lesson, about, panel, note, method, *follows],
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    task.input(
        lambda task, run: (gr.skip(),) * 5 if run else recording(task),
        [task, current],
        [sentence, bar, loss, metric, said],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    go.click(None, None, problem, js="() => ''", show_progress="hidden", api_visibility="private")
    go.click(
        begin,
        [spec, mine, *fields],
        [spec, current, mine, *live],
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="multiple",
        api_visibility="private",
    )
    stop.click(halt, current, stop, show_progress="hidden", concurrency_limit=None, api_visibility="private")

    def show(spec: RunSpec) -> tuple:
        s = here(spec)
        return (
            s.task or tasks.DEFAULT,
            s.model,
            methods.method_value(s.method, s.model),
            *methods.method_updates(s, BY_METHOD, refill=True),
            s.steps,
            s.batch_size,
            s.seed,
            *explained(s),
        )

    shown = [task, model, method, *follows, steps, batch_size, seed, lesson, about, panel, note]
    preset.input(
        changing(page.refusing(use_preset, 2 + len(shown))),
        [spec, preset, *fields],
        [problem, spec, preset, *shown],
        show_progress="hidden",
        api_visibility="private",
    )
    reset.click(
        changing(lambda spec: (plain := RunSpec(model=spec.model, method=spec.method, task=spec.task), *show(plain))),
        spec,
        [spec, *shown],
        show_progress="hidden",
        api_visibility="private",
    )
    return page.View(TAB, show, shown, resumed=page.Event(again, [current], live))


def _zip(job: jobs.Job) -> str | None:
    folder = job.folder / "adapter"
    return str(adapters.pack(folder)) if folder.exists() else None


if __name__ == "__main__":
    with gr.Blocks(title="Live fine-tune", fill_width=True) as demo:
        view = build(gr.State(page.OPENING), gr.BrowserState([]), gr.BrowserState(""))
        demo.load(view.resumed.work, view.resumed.inputs, view.resumed.outputs)
    demo.launch(**page.launch_options())
