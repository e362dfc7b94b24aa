"""Tasks: what a model is taught, and how it is scored. Each file under assets/tasks/ is one; add a file to add a task."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..places import ASSETS
from ..spec import closest

FOLDER = ASSETS / "tasks"
DEFAULT = "ticket"


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    key: str
    name: str
    teaches: str
    """What watching it learn shows."""
    instruction: str
    """The system prompt, the same for the base and the adapted model."""
    metric: str
    """A key of METRICS."""
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    """Never trained on: other templates, names, things and wording."""
    steps: int = 40
    batch_size: int = 4
    sequence_length: int = 256
    max_new_tokens: int = 48
    markers: tuple[str, ...] = ()
    markers_needed: int = 0
    labels: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    key: str
    name: str
    """As in 'Exact records: 0% → 88%'."""
    meaning: str


def exact_match(text: str, row: Row, task: Task) -> float:
    return float(text.strip() == row.answer.strip())


def accuracy(text: str, row: Row, task: Task) -> float:
    named = re.search(r"\b(" + "|".join(re.escape(label.lower()) for label in task.labels) + r")\b", text.lower())
    return float(named is not None and named[0] == row.answer.lower())


def voice(text: str, row: Row, task: Task) -> float:
    plain = " ".join(re.findall(r"[\w']+", text.lower()))
    heard = {m for m in task.markers if re.search(rf"(?<!\w){re.escape(m)}(?!\w)", plain)}
    return float(len(heard) >= task.markers_needed)


SCORES = {"exact_match": exact_match, "accuracy": accuracy, "voice": voice}
METRICS = {
    m.key: m
    for m in (
        Metric("exact_match", "Exact records", "the whole answer equals the reference, character by character"),
        Metric("accuracy", "Accuracy", "the first label that the answer names is the right one"),
        Metric("voice", "Answers in the voice", "the answer holds at least the task's number of marker words"),
    )
}


def score(text: str, row: Row, task: Task) -> float:
    """0 or 1."""
    return SCORES[task.metric](text, row, task)


def read(file: Path) -> Task:
    """Raises SpecError for a file that is not a task."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        known = {k: v for k, v in data.items() if k in Task.__dataclass_fields__}
        extra = {k: v for k, v in data.items() if k not in known}
        for split in ("train", "heldout"):
            known[split] = tuple(Row(**row) for row in data[split])
        for name in ("markers", "labels"):
            known[name] = tuple(known.get(name, ()))
        task = Task(key=file.stem, extra=extra, **known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"task={file}: not a task file ({error}); see assets/tasks/ticket.json for the form") from None
    if not task.train or not task.heldout:
        raise SpecError(f"task={file}: it has no rows to train on or none held out; give at least one of each")
    if task.metric not in SCORES:
        raise SpecError(f"task={file}: metric {task.metric} is unknown; {closest(task.metric, SCORES)}")
    return task


TASKS: dict[str, Task] = {
    file.stem: read(file) for file in sorted(FOLDER.glob("*.json"), key=lambda f: (f.stem != DEFAULT, f.stem))
}


def find(key: str) -> Task:
    """A bundled task, or one read from a file of the same form."""
    if key in TASKS:
        return TASKS[key]
    if key.endswith(".json") and Path(key).exists():
        return read(Path(key))
    raise SpecError(f"task={key}: no such task; {closest(key, TASKS)}")


def drawn(task: Task, rows: int | None, seed: int = 0) -> tuple[Row, ...]:
    """So many of the training rows; more of one seed hold all of fewer. Raises SpecError for more than there are."""
    if rows is None or rows == len(task.train):
        return task.train
    if rows > len(task.train):
        raise SpecError(
            f"training-rows={rows}: the task {task.key} has {len(task.train)}; set it to {len(task.train)} or fewer"
        )
    return tuple(random.Random(seed).sample(task.train, len(task.train))[:rows])


def prompt_ids(tokenizer: Any, task_instruction: str, prompt: str) -> list[int]:
    """Tokens of a prompt as the model reads it, up to where its answer begins."""
    begin: list[int] = []
    if tokenizer.chat_template:  # which says itself how a text begins
        turns = [{"role": "user", "content": prompt}]
        if task_instruction:
            turns.insert(0, {"role": "system", "content": task_instruction})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        begin = opening(tokenizer)
        text = "\n\n".join(part for part in (task_instruction, prompt) if part) + "\n\n"
    return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def opening(tokenizer: Any) -> list[int]:
    """What every text begins with: the beginning-of-sequence token, where the tokenizer adds one.

    Without it Gemma 3 270M reads the bundled prose at 4.5 nats a token instead of 3.0.
    """
    added = tokenizer("")["input_ids"][:1]
    return added if added == [tokenizer.bos_token_id] else []


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Tokens of an answer and the end-of-turn token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
