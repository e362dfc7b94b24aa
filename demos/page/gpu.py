"""Work that a ZeroGPU Space does where the GPU is: how long it asks for, and what is said when it gets none."""

import math
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from html import escape
from typing import ParamSpec, TypeVar
from urllib.parse import urlencode

import gradio as gr

from peftlab import hardware
from peftlab.errors import Interrupted, PeftlabError, RunError, plain
from peftlab.room import jobs, quota

P = ParamSpec("P")
T = TypeVar("T")
AGAIN = "Nothing is lost: press the button again"
ADDRESS = "Visitors who are not signed in share the quota of their network's address, as at a conference"
SAID = {
    r"(?P<asked>\d+)s requested vs\. (?P<left>-?\d+)s left\)\. Try again in (?P<wait>[\d:]+)": (
        "this asks for {asked} s of GPU time, and {left} s of your quota are left. Try again in {wait} (hours, minutes, "
        f"seconds), ask for less, or sign in to Hugging Face. {ADDRESS}"
    ),
    r"runs limit|reached its GPU limit|credits allocated": f"no GPU time is left for you now. {ADDRESS}. {AGAIN} later",
    r"larger than the maximum allowed": "this asks for more GPU time than one press may have; ask for less",
    r"No GPU was available": f"no GPU was free within a minute. {AGAIN}",
    r"GPU task aborted": "the GPU was taken away before the end, because the time that was asked for was over",
    r"[Ee]xpired": "this page has been open for too long to ask for a GPU; reload it, and press the button again",
    r"Connection closed by visitor": f"the page was closed while this waited for a GPU. {AGAIN}",
}
"""What spaces says when there is no GPU, as patterns, and what the page says of it."""


def on_gpu(work: Callable[P, Iterator[T]], asks: Callable[P, quota.Asks]) -> Callable[P, Iterator[T]]:
    """`work`, which a ZeroGPU Space does in a process of its own that has a GPU; `asks` says how much of it.

    Arguments, and what it yields, are pickled. What it raises there is raised here; Interrupted, where it got no GPU. Call
    this at import, when a Space looks for it.
    """
    if not hardware.is_shared():
        return work
    import spaces

    def there(*arguments: P.args, **named: P.kwargs) -> Iterator[tuple[T | None, PeftlabError | None]]:
        import torch

        torch.set_num_threads(1)  # the server's other threads are not in this process, and would be waited for
        try:
            for value in work(*arguments, **named):
                yield value, None
        except PeftlabError as error:
            yield None, error
        except Exception as error:  # of another error no more than its name would come back
            yield None, RunError(plain(error))

    def duration(*arguments: P.args, **named: P.kwargs) -> int:
        return math.ceil(quota.asked(quota.predicted(asks(*arguments, **named))) / _stretched())

    lent = spaces.GPU(there, duration=duration)

    def here(*arguments: P.args, **named: P.kwargs) -> Iterator[T]:
        try:
            for value, error in lent(*arguments, **named):
                if error is not None:
                    raise error
                yield value
        except PeftlabError:
            raise
        except Exception as error:  # gr.Error, and whatever else spaces raises
            raise Interrupted(in_words(error)) from error

    return here


def _stretched() -> float:
    """How many times longer than asked for spaces lets a call be, on a GPU that it takes for slow."""
    from spaces.zero import client

    return client.get_duration_seconds(timedelta(seconds=100), None) / 100


def sign_in() -> str:
    """A link for somebody who has no quota of their own yet: it leads back to this Space, as Hugging Face shows it."""
    if not (space := os.environ.get("SPACE_ID")):
        return ""
    address = f"https://huggingface.co/login?{urlencode({'next': f'/spaces/{space}'})}"
    link = f'<a href="{escape(address)}" target="_blank" rel="noopener">Sign in to Hugging Face</a>'
    return f"Not signed in? {link} for a quota of your own."


def on_job(kind: str) -> None:
    """Has jobs of a kind done where the GPU is."""
    jobs.WORK[kind] = on_gpu(jobs.WORK[kind], lambda arguments, *_: quota.of_job(kind, arguments))


def in_words(error: Exception) -> str:
    """What the page says of an error of spaces."""
    text = str(error.message if isinstance(error, gr.Error) else error)
    for pattern, said in SAID.items():
        if found := re.search(pattern, text):
            return said.format(**found.groupdict())
    return f"the shared GPU failed ({type(error).__name__}: {text[:200]}). {AGAIN}"
