"""Tab 4, did it work? The same prompt to the base and to the adapter, and the score of both."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import page
from demos.adapter_choice import bundled, choices, of, task_of
from demos.gpu import on_gpu
from peftlab import PeftlabError, compare, figures, tasks, words
from peftlab.compare import ComparisonReport
from peftlab.generate import Decoding
from peftlab.tasks import METRICS, TASKS


def recorded_pair(report: ComparisonReport | None, prompt: str) -> tuple[str, str] | None:
    """What base and adapter said to a held-out prompt when the adapter was made."""
    for exchange in report.exchanges if report else ():
        if exchange.prompt == prompt:
            base, adapted = exchange.replies
            return base.text.strip(), adapted.text.strip()
    return None


def generate(
    key: str, prompt: str, tokens: int, temperature: float, seed: int
) -> Iterator[tuple[str, str, float, float]]:
    """Both texts so far and their seconds, after each token of both."""
    adapter = of(key)
    base, models = compare.models_of([adapter])
    decoding = Decoding(int(tokens), temperature, seed=int(seed))
    virtual = adapter.spec.virtual_tokens or 0
    ids = compare.prompt_tokens(base, task_of(adapter).instruction, prompt, decoding, virtual)
    for said in compare.side_by_side(base, models, ids, decoding):
        left, right = said.values()
        yield left.text, right.text, left.seconds, right.seconds


def scored(key: str) -> Iterator[tuple[float, ComparisonReport | None]]:
    """The held-out score of both, now: share done, and at last the report."""
    adapter = of(key)
    work = compare.on_task([adapter], task_of(adapter))
    while True:
        try:
            yield next(work), None
        except StopIteration as finished:
            yield 1.0, finished.value
            return


GENERATE, SCORED = on_gpu(generate), on_gpu(scored)


def build(mine: gr.BrowserState) -> page.Event:
    first = next(iter(bundled()), "")

    def about(key: str) -> tuple:
        """An adapter's picture from its own recording: sentence, panes, examples and score."""
        adapter = of(key)
        task = task_of(adapter)
        report = compare.recorded(adapter)
        prompts = [row.prompt for row in task.heldout]
        base, adapted = recorded_pair(report, prompts[0]) or ("", "")
        return (
            words.compare_sentence(report)
            if report
            else "This adapter has no recorded score: press Score to measure it.",
            gr.update(value=prompts[0]),
            gr.update(choices=prompts, value=prompts[0]),
            base,
            adapted,
            reference(task, prompts[0], "Recorded when the adapter was made"),
            *scores(report, task),
        )

    def scores(report: ComparisonReport | None, task: tasks.Task) -> tuple:
        return (
            figures.themed(figures.score_bars, report, METRICS[task.metric].name) if report else None,
            table(report, task) if report else "",
        )

    def reference(task: tasks.Task, prompt: str, source: str) -> str:
        row = next((r for r in task.heldout if r.prompt == prompt), None)
        said = f"Reference: <code>{escape(row.answer)}</code>. " if row else ""
        return f"{escape(source)}. {said}Instruction to both: “{escape(task.instruction)}”"

    start = about(first)
    sentence = page.sentence(start[0])
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            adapter = gr.Dropdown(
                choices([]), value=first, label="Adapter", info="Trained here, or bundled with the app"
            )
            examples = gr.Dropdown(
                start[2]["choices"], value=start[2]["value"], label="Held-out examples", info="Never seen in training"
            )
            with gr.Accordion("Decoding, the same for both", open=True):
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", info="0 takes the likeliest token")
                tokens = gr.Slider(8, 256, 64, step=8, label="Longest answer, tokens")
                seed = gr.Number(0, precision=0, label="Seed")
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            prompt = gr.Textbox(start[1]["value"], label="Prompt", lines=2, max_lines=6)
            with gr.Row(elem_classes="run-row"):
                ask = gr.Button("Ask both", variant="primary", scale=0, min_width=160)
            with gr.Row(elem_classes="panes"):
                left = gr.Textbox(
                    start[3], label="Base model", lines=4, max_lines=12, interactive=False, elem_classes="pane base"
                )
                right = gr.Textbox(
                    start[4],
                    label="With the adapter",
                    lines=4,
                    max_lines=12,
                    interactive=False,
                    elem_classes="pane adapted",
                )
            said = page.note(start[5])
            chart = page.plot(start[6], "The task's metric for base and adapter, with 95% intervals")
            with gr.Row(elem_classes="lessons"):
                measure = gr.Button(f"Score all {len(TASKS[tasks.DEFAULT].heldout)} held-out items here", size="sm")
            with gr.Accordion("Every held-out answer", open=False):
                every = gr.HTML(start[7])
    picture = [sentence, prompt, examples, left, right, said, chart, every]

    def pick(key: str, text: str) -> tuple:
        """A held-out example, with the recorded answers where there are any."""
        a = of(key)
        pair = recorded_pair(compare.recorded(a), text)
        base, adapted = pair or ("", "")
        return (
            text,
            base,
            adapted,
            reference(task_of(a), text, "Recorded when the adapter was made" if pair else "Press Ask both"),
        )

    def talk(key: str, text: str, tokens: int, temperature: float, seed: float) -> Iterator[tuple]:
        yield "", "", "", "Loading the model.", gr.update(interactive=False)
        try:
            last = ("", "", 0.0, 0.0)
            for last in GENERATE(key, text, tokens, temperature, int(seed or 0)):
                yield gr.skip(), last[0], last[1], gr.skip(), gr.skip()
            seconds = f"Base {words.seconds(last[2])}, adapter {words.seconds(last[3])}, just now"
            yield (
                "",
                last[0].strip(),
                last[1].strip(),
                reference(task_of(of(key)), text, seconds),
                gr.update(interactive=True),
            )
        except PeftlabError as error:
            yield escape(str(error)), gr.skip(), gr.skip(), "", gr.update(interactive=True)

    def score_now(key: str) -> Iterator[tuple]:
        task = task_of(of(key))
        try:
            for share, report in SCORED(key):
                if report is None:
                    yield (
                        "",
                        gr.skip(),
                        gr.skip(),
                        gr.skip(),
                        gr.update(value=f"Scoring, {words.score(share)}", interactive=False),
                    )
                    continue
                done = gr.update(value=f"Score all {len(task.heldout)} held-out items here", interactive=True)
                yield "", words.compare_sentence(report), *scores(report, task), done
        except PeftlabError as error:
            yield escape(str(error)), gr.skip(), gr.skip(), gr.skip(), gr.update(interactive=True)

    quiet = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    adapter.input(about, adapter, picture, **quiet)
    examples.input(pick, [adapter, examples], [prompt, left, right, said], **quiet)
    one_at_a_time = {
        "show_progress": "hidden",
        "concurrency_id": "generate",
        "concurrency_limit": 1,
        "api_visibility": "private",
    }
    gr.on(
        [ask.click, prompt.submit],
        talk,
        [adapter, prompt, tokens, temperature, seed],
        [problem, left, right, said, ask],
        **one_at_a_time,
    )
    measure.click(score_now, adapter, [problem, sentence, chart, every, measure], **one_at_a_time)

    def opened(mine: list[str], chosen: str) -> tuple:
        """An adapter trained since the last look comes first and is chosen."""
        known = choices(mine)
        key = known[0][1] if mine and known and known[0][1] == mine[-1] else chosen
        if key == chosen:
            return (gr.update(choices=known), *page.skipped(picture))
        return (gr.update(choices=known, value=key), *about(key))

    return page.Event(opened, [mine, adapter], [adapter, *picture])


def _said(reply: compare.Reply) -> str:
    verdict = '<span class="good">right</span>' if reply.score else '<span class="bad">wrong</span>'
    return f'<td class="said">{escape(reply.text.strip())}<br>{verdict}</td>'


def table(report: ComparisonReport, task: tasks.Task) -> str:
    rows = "".join(
        f"<tr><td>{escape(e.prompt)}</td>{''.join(_said(r) for r in e.replies)}</tr>" for e in report.exchanges
    )
    tip = f"Right means: {METRICS[task.metric].meaning}. Greedy decoding, one batch."
    return (
        f'<div class="wide"><table class="data answers"><tr><th>prompt {page.how("measured", tip)}</th><th>base</th>'
        f"<th>adapter</th></tr>{rows}</table></div>"
    )


if __name__ == "__main__":
    with gr.Blocks(title="Side by side", fill_width=True) as demo:
        build(gr.BrowserState([]))
    demo.launch(**page.launch_options())
