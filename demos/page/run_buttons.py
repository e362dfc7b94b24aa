"""A run or a race that was started here: its buttons, and when to look at it again."""

from __future__ import annotations

import gradio as gr

from demos.page.tab import Values
from peftlab.room.jobs import Job

POLL = 0.5
"""Seconds between two looks."""


def buttons(job: Job | None, start: str, under_way: str, once_more: str, stop: str) -> Values:
    """The buttons `go` and `stop`. The texts are those of `go` before, during and after a run, and that of `stop`."""
    runs = job is not None and not job.over
    stopping = job is not None and job.stopping
    go = under_way if runs else once_more if job else start
    return {
        "go": gr.update(interactive=not runs, value=go),
        "stop": gr.update(interactive=runs and not stopping, value="Stopping" if stopping else stop),
    }


def again(job: Job | None) -> float | None:
    """Seconds after which there may be more to see; None where nothing is under way."""
    return POLL if job and not job.over else None
