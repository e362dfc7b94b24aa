"""Tasks: what a model is taught, and how it is scored. Each file under assets/tasks/ is one; add a file to add a task."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..catalog import entry_of
from ..errors import SpecError
from ..places import ASSETS
from ..spec import closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "ticket"


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str


class Recipe(NamedTuple):
    """How much is trained where nothing else is asked for."""

    steps: int
    batch_size: int


@dataclass(frozen=True)
class Task:
    key: str
    name: str
    teaches: str
    """What one sees when one watches a model learn it."""
    instruction: str
    """The system prompt, the same for the base and the adapted model."""
    metric: str
    """A key of METRICS."""
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    """Never trained on: other templates, names, things and wording. A run's score is of these."""
    more: tuple[Row, ...] = ()
    """Further rows of the kind of `heldout`. A live run has no time for them; with them, how reliably a recipe works can be
    judged by over 200 items."""
    steps: int = 40
    batch_size: int = 4
    on_gpu: Recipe | None = None
    """In place of these two where a GPU trains, to which a batch of 16 rows costs little more time than one of 4."""
    sequence_length: int = 256
    max_new_tokens: int = 48
    markers: tuple[str, ...] = ()
    """Words and phrases, in lower case, of which a `voice` answer holds at least `markers_needed`."""
    markers_needed: int = 0
    labels: tuple[str, ...] = ()
    """The answers that an `accuracy` task chooses from."""
    rows_since: str = ""
    """The day from which on its training rows are these, as in 2026-11-30: older recordings were made with others."""
    licence: str = ""


def accuracy(text: str, row: Row, task: Task) -> bool:
    """Whether the first label that a text names is the answer."""
    named = re.search(r"\b(" + "|".join(re.escape(label.lower()) for label in task.labels) + r")\b", text.lower())
    return named is not None and named[0] == row.answer.lower()


def voice(text: str, row: Row, task: Task) -> bool:
    """Whether a text has enough of the task's markers, as whole words."""
    plain = " ".join(re.findall(r"[\w']+", text.lower()))
    heard = {m for m in task.markers if re.search(rf"(?<!\w){re.escape(m)}(?!\w)", plain)}
    return len(heard) >= task.markers_needed


@dataclass(frozen=True)
class Metric:
    name: str
    """As in 'Exact records: 0% → 88%'."""
    meaning: str
    is_right: Callable[[str, Row, Task], bool]
    """Of a model's text."""


METRICS = {
    "exact_match": Metric(
        "Exact records",
        "the whole answer equals the reference, character by character",
        lambda text, row, _: text.strip() == row.answer.strip(),
    ),
    "accuracy": Metric("Accuracy", "the first label that the answer names is the right one", accuracy),
    "voice": Metric("Answers in the voice", "the answer holds at least the task's number of marker words", voice),
}


def score(text: str, row: Row, task: Task) -> float:
    """0 or 1 for a model's text, by the task's metric."""
    return float(METRICS[task.metric].is_right(text, row, task))


def read(file: Path) -> Task:
    """The task of a JSON file; keys that no task has are left out. Raises SpecError for a file that is not a task."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        known = {name: value for name, value in data.items() if name in Task.__dataclass_fields__}
        known |= {split: tuple(Row(**row) for row in data[split]) for split in ("train", "heldout")}
        known["more"] = tuple(Row(**row) for row in data.get("more", ()))
        known |= {name: tuple(data.get(name, ())) for name in ("markers", "labels")}
        known["on_gpu"] = Recipe(**data["on_gpu"]) if "on_gpu" in data else None
        task = Task(key=file.stem, **known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"task={file}: not a task file ({error}); see assets/tasks/ticket.json for the form") from None
    if not task.train or not task.heldout:
        raise SpecError(f"task={file}: it has no rows to train on or none held out; give at least one of each")
    if task.metric not in METRICS:
        raise SpecError(f"task={file}: metric {task.metric} is unknown; {closest(task.metric, METRICS)}")
    return task


TASKS: dict[str, Task] = {
    file.stem: read(file)
    for file in sorted((ASSETS / "tasks").glob("*.json"), key=lambda file: (file.stem != DEFAULT, file.stem))
}


def find(key: str) -> Task:
    """A bundled task, or one read from a file of the same form. Raises SpecError for an unknown key."""
    if key not in TASKS and key.endswith(".json") and Path(key).exists():
        return read(Path(key))
    return entry_of("task", key, TASKS)


def drawn(task: Task, rows: int, seed: int = 0) -> tuple[Row, ...]:
    """So many training rows, 0 for all; with one seed, more of them hold the fewer. Raises SpecError where they are too few."""
    if rows in (0, have := len(task.train)):
        return task.train
    if rows > have:
        raise SpecError(f"training-rows={rows}: the task {task.key} has {have}; set it to {have} or fewer")
    return tuple(random.Random(seed).sample(task.train, have)[:rows])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, task_instruction: str, prompt: str) -> list[int]:
    """Tokens of a prompt as the model reads it, up to where its answer begins."""
    if not tokenizer.chat_template:
        text = "\n\n".join(part for part in (task_instruction, prompt) if part) + "\n\n"
        return [*opening(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    turns = [{"role": "user", "content": prompt}]
    if task_instruction:
        turns.insert(0, {"role": "system", "content": task_instruction})
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False)["input_ids"]  # the template says itself how a text begins


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer adds one: without it Gemma 3 reads prose 1.5 nats a token worse."""
    added = tokenizer("")["input_ids"][:1]
    return added if added == [tokenizer.bos_token_id] else []


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Tokens of an answer and the end-of-turn token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
