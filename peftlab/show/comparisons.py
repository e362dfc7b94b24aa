"""Base and adapter side by side, in words: their answers, their scores, and where these come from."""

from __future__ import annotations

from html import escape

from ..adapters import Adapter
from ..compare import ComparisonReport, Reply
from ..data.tasks import METRICS, Task
from ..race import scores
from . import sentences
from .figures import themed
from .marks import explained, graded, how, table
from .run_figures import score_bars


def recorded_pair(report: ComparisonReport | None, prompt: str) -> tuple[str, str] | None:
    """What base and adapter said to a held-out prompt when the adapter was made; None where that was not recorded."""
    for exchange in report.exchanges if report else ():
        if exchange.prompt == prompt:
            base, adapted = exchange.replies
            return base.text.strip(), adapted.text.strip()
    return None


def reference(task: Task, prompt: str, source: str) -> str:
    """Where the answers on screen are from, what would be right, and what both models are told."""
    row = next((r for r in task.heldout if r.prompt == prompt), None)
    said = f"Reference: <code>{escape(row.answer)}</code>. " if row else ""
    return f"{escape(source)}. {said}Instruction to both: “{escape(task.instruction)}”"


def whence(adapter: Adapter) -> str:
    """What the recorded score was trained with, and why other tabs show another."""
    mark = how("measured", f"Saved {adapter.saved}. {adapter.result.get('device', '')}")
    recorded = scores.of_adapter(adapter)
    more = explained(escape(scores.elsewhere(recorded)))
    return f"{mark} Recorded on {escape(recorded.hardware)}: {recorded.settings()}. {more}"


def scored_value(report: ComparisonReport, task: Task) -> dict[str, object]:
    """What the panels of a score show, by name."""
    return {
        "sentence": explained(sentences.compare_sentence(report)),
        "chart": themed(score_bars, report, METRICS[task.metric].name),
        "every": _answers(report, task),
    }


def _answers(report: ComparisonReport, task: Task) -> str:
    """Every held-out item: what both said, and whether it is right."""

    def said(reply: Reply) -> str:
        return f'<td class="said">{escape(reply.text.strip())}<br>{graded(reply.score)}</td>'

    rows = (f"<tr><td>{escape(e.prompt)}</td>{''.join(map(said, e.replies))}</tr>" for e in report.exchanges)
    tip = f"Right means: {METRICS[task.metric].meaning}. Greedy decoding, one batch."
    return table((f"prompt {how('measured', tip)}", "base", "adapter"), rows, "answers")
