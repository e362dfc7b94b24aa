"""How long a visitor's work takes on a shared GPU, in a process that is new to it: what counts against a quota."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from ..data import tasks
from ..memory import exact
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import worker
from .jobs import resolved

MARGIN = 1.6
"""So many times what work is said to take is asked for: it ends when that is over, and only seconds used are counted."""
LONGEST = 120
"""Seconds that a visitor without an account has in a day, and so the most that is asked for at once."""
BEGINNING = 5.0
"""Seconds until the GPU, the model and each kernel are ready, and for the end of a run; held against `bench fresh`."""
READING = 1e9
"""Bytes of a model's file that are read in a second."""
CAPTURES = 6
"""How many steps' time it takes to prepare those that follow, and to evaluate between them beside the answers themselves."""
PROOF = 500
"""Tokens of the longest proof: four models are timed on 17 tokens, six times."""


@dataclass(frozen=True)
class Asks:
    """Work for which a GPU is asked."""

    trained: tuple[Resolved, ...] = ()
    """The runs, each of which is evaluated three times."""
    seeds: int = 1
    most: float | None = None
    """Seconds of training that each run has, where they are bounded."""
    answering: Resolved | None = None
    """The run of the adapter that answers, where nothing is trained."""
    tokens: int = 0
    """How many tokens come one after the other then."""


def of_job(kind: str, arguments: Json) -> Asks:
    """What a job of room.jobs asks for."""
    spec = resolved(arguments["spec"])
    if kind == "score":
        return Asks(answering=spec, tokens=2 * tasks.find(spec.task).max_new_tokens)
    if kind == "train":
        return Asks((spec,))
    racers = tuple(resolved(racer) for _, racer in arguments["racers"])
    return Asks(racers, arguments["seeds"], arguments["seconds"])


def of_answers(spec: RunSpec, tokens: int) -> Asks:
    """What it takes to have a base and its adapter answer with so many tokens each."""
    return Asks(answering=resolve(spec), tokens=2 * tokens)


def of_proof(spec: RunSpec) -> Asks:
    """What a proof on the LoRA tab asks for."""
    return Asks(answering=resolve(spec), tokens=PROOF)


def seconds(asks: Asks) -> float:
    """Seconds that the work takes, from its process's start to its end. It traces steps, which itself takes seconds."""
    if asks.answering is not None:
        return _beginning(asks.answering) + asks.tokens * _token(asks.answering)
    each = [_training(run, asks.most) for run in asks.trained]
    return max(map(_beginning, asks.trained)) + asks.seeds * sum(each)


def predicted(asks: Asks) -> float:
    """The same from the process of long work, which has no GPU; it waits until that is known."""
    return asyncio.run(worker.once(seconds, asks))


def asked(seconds: float) -> int:
    """Seconds to ask for, for work that is said to take `seconds`."""
    return min(LONGEST, math.ceil(MARGIN * seconds))


def _beginning(run: Resolved) -> float:
    return BEGINNING + exact(resolve(run.but(method="lora")), quick=True).frozen_weights / READING


def _training(run: Resolved, most: float | None) -> float:
    """Seconds of a run's steps, and of its three evaluations of all held-out rows at once."""
    steps = (run.steps + CAPTURES) * (exact(run, quick=True).step_seconds or 0.0)
    answers = 3 * tasks.find(run.task).max_new_tokens * _token(run)
    return answers + (steps if most is None else min(most, steps))


def _token(run: Resolved) -> float:
    """Seconds of one token of an answer: no more than a step of one example, which reads all weights three times."""
    return exact(resolve(run.but(batch_size=1, accumulation=1)), quick=True).step_seconds or 0.0
