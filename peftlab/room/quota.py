"""How long a visitor's work takes on a shared GPU, in a process that is new to it: what counts against a quota."""

from __future__ import annotations

import math

from ..data import tasks
from ..memory import exact
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from .jobs import resolved

MARGIN = 1.5
"""So many times what work is said to take is asked for: it ends when that is over, and only seconds used are counted."""
LONGEST = 120
"""Seconds that a visitor without an account has in a day, and so the most that is asked for at once."""
BEGINNING = 5.0
"""Seconds until the GPU, the model and each kernel are ready; see `bench shared`."""
READING = 1e9
"""Bytes of a model's file that are read in a second."""
PROOF = 500
"""Tokens of the longest proof: four models are timed on 17 tokens, six times."""
CAPTURES = 6
"""How many steps' time it takes to prepare those that follow, and to evaluate between them beside the answers themselves."""


def asked(seconds: float) -> int:
    """Seconds to ask for, for work that is said to take `seconds`."""
    return min(LONGEST, math.ceil(MARGIN * seconds))


def of_job(kind: str, arguments: Json) -> float:
    """Seconds that a job of room.jobs takes, from the process's start to its end."""
    spec = resolved(arguments["spec"])
    if kind == "score":
        return beginning(spec) + 2 * of_answers(spec)
    if kind == "train":
        return beginning(spec) + of_training(spec)
    racers = [resolved(racer) for _, racer in arguments["racers"]]
    each = arguments["seconds"]
    longest = [
        of_training(one) if each is None else min(each + 3 * of_answers(one), of_training(one)) for one in racers
    ]
    return max(map(beginning, racers)) + arguments["seeds"] * sum(longest)


def of_answering(spec: RunSpec, tokens: int) -> float:
    """Seconds of so many tokens by a base and by its adapter."""
    run = resolve(spec)
    return beginning(run) + 2 * tokens * of_token(run)


def of_proof(spec: RunSpec) -> float:
    """Seconds of a proof on the LoRA tab, which takes no more than PROOF tokens."""
    run = resolve(spec)
    return beginning(run) + PROOF * of_token(run)


def beginning(spec: Resolved) -> float:
    """Seconds until the first step or token."""
    model = exact(resolve(spec.but(method="lora")), quick=True).frozen_weights
    return BEGINNING + model / READING


def of_training(spec: Resolved) -> float:
    """Seconds of a run's steps and of its three evaluations."""
    return (spec.steps + CAPTURES) * of_step(spec) + 3 * of_answers(spec)


def of_step(spec: Resolved) -> float:
    return exact(spec, quick=True).step_seconds or 0.0


def of_answers(spec: Resolved) -> float:
    """Seconds of a task's held-out answers, all in one batch."""
    return tasks.find(spec.task).max_new_tokens * of_token(spec)


def of_token(spec: Resolved) -> float:
    """Seconds of one token of an answer: no more than a step of one example, which reads all weights three times."""
    return of_step(resolve(spec.but(batch_size=1, accumulation=1)))
