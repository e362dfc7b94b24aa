"""Questions, and answers kept as finished bytes for the next visitor who asks the same, without what is a visitor's own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from demos.page.question import Question, sound
from demos.page.serving import as_json
from demos.page.tab import Slow
from peftlab.base.models import DEFAULT, MODELS
from peftlab.room import worker
from peftlab.spec import SETTINGS

if TYPE_CHECKING:
    from demos.page.store import Store

Answer: TypeAlias = dict[str, Any]  # what a page gets as JSON; `Store.answer` says what is in it
OWN = ("number", "visitor")
"""Parts of an answer that are not kept: the question's number, and the token of a browser that is new here."""
ROOM = 2**24
"""So many bytes of answers are kept, the latest that were asked for."""
LONGEST = 2000
"""Bytes of a question whose answer is kept. One with a pasted config.json is longer, and nobody else asks it."""


@dataclass(frozen=True)
class Finished:
    """An answer without OWN, whose pictures are JSON already."""

    parts: Answer
    size: int
    """Bytes of the pictures."""
    undone: tuple[Slow, ...]
    """Slow work that would have been shown, had it been done."""

    @classmethod
    def of(cls, answer: Answer, undone: tuple[Slow, ...]) -> Finished:
        show = as_json(answer["show"])
        parts = {name: value for name, value in answer.items() if name not in OWN}
        return cls(parts | {"show": orjson.Fragment(show)}, len(show), undone)

    @property
    def holds(self) -> bool:
        """Whether it is still what would be answered: none of that work has been done since."""
        return all(worker.known(slow.work, *slow.arguments) is None for slow in self.undone)

    def to(self, number: object, own: Mapping[str, object]) -> bytes:
        """The answer to somebody's question, with their `own` parts."""
        return as_json({"number": number, **self.parts, **own})

    def exact(self, number: object) -> bytes:
        """The exact answer to somebody's question, which shows the same."""
        return as_json({"number": number, "show": self.parts["show"]})


class Answers:
    """A store's answers as bytes. The newest `room` bytes are kept; where something is refused or fails, nothing is."""

    def __init__(self, store: Store, room: int = ROOM) -> None:
        self.store, self.room, self.held = store, room, 0
        self.finished: OrderedDict[bytes, Finished] = OrderedDict()
        self.lock = threading.Lock()

    def known(self, asks: object) -> bytes | None:
        """The bytes of `Store.answer`, if they are kept, or are made sooner than a thread would take them over."""
        question = sound(asks)
        if found := self._find(self.key(question)):
            return found.to(question.number, self.store.greeted(question.kept))
        return self.made(asks) if self.is_quick(question) else None

    def made(self, asks: object) -> bytes:
        """The bytes of `Store.answer`."""
        question = sound(asks)
        answer, finished = self._made(question)
        return finished.to(question.number, {n: answer[n] for n in OWN if n in answer}) if finished else as_json(answer)

    def _made(self, question: Question) -> tuple[Answer, Finished | None]:
        """An answer; finished, where it is kept."""
        answer, undone = self.store.answered(question)
        if answer["problems"] or (key := self.key(question)) is None:
            return answer, None
        finished = Finished.of(answer, undone)
        self._keep(key, finished)
        return answer, finished

    def known_exact(self, asks: object) -> bytes | None:
        """The bytes of `Store.exact`, if they are kept: an answer that waits for no slow work is exact."""
        question = sound(asks)
        found = self._find(self.key(question))
        return found.exact(question.number) if found and not found.undone else None

    async def made_exact(self, asks: object) -> bytes:
        """The bytes of `Store.exact`."""
        question = sound(asks)
        failed = await self.store.done(question)
        if failed is not None:
            return as_json({"number": question.number, "show": failed})
        found = self._find(self.key(question))
        if found is None or found.undone:  # the first of those who waited draws it
            answer, found = self._made(question)
        return found.exact(question.number) if found else as_json({"number": question.number, "show": answer["show"]})

    def key(self, question: Question) -> bytes | None:
        """By what an answer is kept: the settings, and what is in sight. None where that is not all that it depends on."""
        tab = self.store.tab_of(question)
        seen = {None, *question.open}
        if not tab.lasting or any(tab.folded.get(panel) in seen for panel in tab.changing):
            return None
        try:
            key = orjson.dumps([tab.key, question.state, sorted(seen & tab.folds.keys())], option=orjson.OPT_SORT_KEYS)
        except TypeError:  # a number that JSON has and orjson has not
            return None
        return key if len(key) <= LONGEST else None

    def is_quick(self, question: Question) -> bool:
        """Whether an answer takes a few milliseconds whoever asks: nothing has to be fetched, and few names can be wrong."""
        own, state = {*SETTINGS, *self.store.choices}, question.state
        known = state.keys() <= own and all(len(str(value)) <= LONGEST for value in state.values())
        return (
            self.store.tab_of(question).quick
            and not question.open
            and known
            and str(state.get("model", DEFAULT)) in MODELS
        )

    def _find(self, key: bytes | None) -> Finished | None:
        with self.lock:
            if key is None or (found := self.finished.get(key)) is None:
                return None
            if not found.holds:
                self._drop(key)
                return None
            self.finished.move_to_end(key)
            return found

    def _keep(self, key: bytes, finished: Finished) -> None:
        with self.lock:
            self._drop(key)
            self.finished[key] = finished
            self.held += len(key) + finished.size
            while self.held > self.room:
                self._drop(next(iter(self.finished)))

    def _drop(self, key: bytes) -> None:
        if old := self.finished.pop(key, None):
            self.held -= len(key) + old.size
