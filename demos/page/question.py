"""A page's question, made sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """What a page asks: `state` is what the address says, `kept` as in `Asked`, `open` the names of the open folds."""

    number: object
    tab: str
    state: dict[str, Any]
    kept: dict[str, Any]
    open: list[str]


def sound(asks: object) -> Question:
    """A question out of whatever somebody sent: a part that has another type is left empty."""
    given: dict[str, Any] = _encodable(asks) if isinstance(asks, dict) else {}

    def part(name: str, form: type) -> Any:
        return given[name] if isinstance(given.get(name), form) else form()

    opened = [name for name in part("open", list) if isinstance(name, str)]
    return Question(given.get("number"), part("tab", str), part("state", dict), part("kept", dict), opened)


def _encodable(value: Any) -> Any:
    """The same with a question mark for each half of a character, which no answer could repeat."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(one) for name, one in value.items()}
    return [_encodable(one) for one in value] if isinstance(value, list) else value
