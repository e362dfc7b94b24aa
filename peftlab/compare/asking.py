"""Base and adapted models that answer: a prompt token by token, or every held-out row of a task."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from .. import adapters, fused
from ..adapters import Adapter
from ..base import configs, weights
from ..count import BYTES
from ..data import tasks
from ..errors import SpecError
from ..resolve import resolve_again
from ..run.events import Work
from ..run.generate import Decoding, stream
from ..run.scoring import answer, base_answers, nats_per_token
from .reports import BASE, ComparisonReport, Exchange, Reply, Score, score_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def models_of(chosen: list[Adapter], merged: bool = False) -> tuple[weights.Base, dict[str, PreTrainedModel]]:
    """The base that `chosen` share, and models ready to generate by name, the base first.

    The base has the widest precision of their runs. Raises AdapterError for an adapter that does not fit, and SpecError
    where they were trained on different bases or where one that is to be `merged` cannot be.
    """
    bases = {f"{a.spec.model} {a.spec.quantization or 'none'}".removesuffix(" none") for a in chosen}
    if len(bases) != 1:
        raise SpecError(f"these adapters have different bases ({', '.join(sorted(bases))}); compare one base's")
    put = adapters.merge if merged else adapters.apply
    whole = {"quantization": "none"} if merged else {}
    specs = [resolve_again(a.spec.but(**whole)) for a in chosen]
    base = weights.load(max(specs, key=lambda spec: BYTES[spec.precision]))  # no adapter is rounded
    models = {BASE: base.quick}
    for a in chosen:
        models[str(a.folder) if a.label in models else a.label] = put(base, a)
    return base, models


def prompt_tokens(
    base: weights.Base, instruction: str, prompt: str, decoding: Decoding, virtual_tokens: int = 0
) -> list[int]:
    """Token ids of the prompt as the model reads it, after the task's instruction.

    Raises SpecError for a prompt that is empty or that leaves no room for an answer after an adapter's virtual tokens.
    """
    if not prompt.strip():
        raise SpecError("the prompt is empty: write a sentence, or take one of the held-out examples")
    ids = tasks.prompt_ids(base.tokenizer, instruction, prompt)
    context = (configs.context(base.model.config) or 1024) - virtual_tokens
    room = context - decoding.max_new_tokens
    if room < 1:
        raise SpecError(
            f"max-new-tokens={decoding.max_new_tokens}: {base.entry.name} reads {context:,} tokens, prompt and answer "
            f"together; set it to {context // 2:,} or less"
        )
    if len(ids) > room:
        raise SpecError(
            f"the prompt has {len(ids):,} tokens; {base.entry.name} reads {context:,} and the answer takes up to "
            f"{decoding.max_new_tokens}: shorten it to {room:,} tokens"
        )
    return ids


def instruction_of(adapter: Adapter) -> str:
    """The system prompt that the adapter was trained with; empty where its task is not a bundled one."""
    task = tasks.TASKS.get(adapter.spec.task or "")
    return task.instruction if task else ""


def side_by_side(
    base: weights.Base, models: dict[str, PreTrainedModel], prompt: list[int], decoding: Decoding
) -> Iterator[dict[str, Reply]]:
    """Yields all that each model has said, after each token: base and plain LoRA as one batch, other models a token in turn."""
    joint = fused.together(weights.share(base.model), list(models.values())[1:])
    said = {name: Reply(name, "", 0.0) for name in models}
    if joint is not None:
        begun = time.perf_counter()
        for all_texts in stream(joint, base.tokenizer, prompt, decoding, len(models)):
            seconds = time.perf_counter() - begun
            for name, text in zip(models, all_texts, strict=True):
                if text != said[name].text or not said[name].seconds:
                    said[name] = Reply(name, text, seconds)
            yield dict(said)
        return
    streams = {name: stream(model, base.tokenizer, prompt, decoding) for name, model in models.items()}
    while streams:
        for name in list(streams):
            begun = time.perf_counter()
            texts = next(streams[name], None)
            seconds = said[name].seconds + time.perf_counter() - begun
            if texts is None:
                del streams[name]
            said[name] = Reply(name, texts[0] if texts else said[name].text, seconds)
        yield dict(said)


def on_prompt(chosen: list[Adapter], prompt: str, decoding: Decoding, merged: bool = False) -> ComparisonReport:
    """What the base and each adapter answer to one prompt. Raises what `models_of` and `prompt_tokens` do."""
    base, models = models_of(chosen, merged)
    virtual = max(a.spec.virtual_tokens or 0 for a in chosen)
    ids = prompt_tokens(base, instruction_of(chosen[0]), prompt, decoding, virtual)
    *_, said = side_by_side(base, models, ids, decoding)
    return ComparisonReport(None, None, (Exchange(prompt, None, tuple(said.values())),), (), notes_on(chosen))


def on_task(chosen: list[Adapter], task: tasks.Task, merged: bool = False) -> Generator[float, None, ComparisonReport]:
    """Asks every model every held-out row. Yields the share done, 0–1; returns the report. Raises what `models_of` does."""
    base, models = models_of(chosen, merged)
    replies: list[list[Reply]] = []
    scores: list[Score] = []
    prose: dict[str, float] = {}
    for number, (name, model) in enumerate(models.items()):
        begun = time.perf_counter()
        known = name == BASE and task in base.measured.get("answers", ())
        work = base_answers(base, task) if name == BASE else answer(model, base.tokenizer, task, task.heldout)
        for share in (told := Work(work)):
            yield (number + share) / len(models)
        seconds = 0.0 if known else (time.perf_counter() - begun) / len(task.heldout)
        prose[name] = nats_per_token(model, base.tokenizer)
        forgetting = None if name == BASE else prose[name] - prose[BASE]
        replies.append([Reply(name, a.text, seconds, a.score) for a in told.result])
        scores.append(score_of(name, [a.score for a in told.result], forgetting))
    rows = zip(task.heldout, *replies, strict=True)
    exchanges = tuple(Exchange(row.prompt, row.answer, tuple(of_row)) for row, *of_row in rows)
    return ComparisonReport(task.key, task.metric, exchanges, tuple(scores), notes_on(chosen))


def notes_on(chosen: list[Adapter]) -> tuple[str, ...]:
    """What was left out of each adapter's settings, in words."""
    return tuple(note for adapter in chosen if (note := adapters.set_aside(adapter)))
