"""What went wrong, in words, and the button that cures it, where settings are known that do."""

from collections.abc import Mapping, Sequence
from html import escape

from ..run.events import Event
from ..spec import SETTINGS
from .marks import remarks, replacing
from .settings import short


def refusal(message: str, settings: Mapping[str, object], change: str) -> str:
    """As HTML; the button keeps all settings but these."""
    words = escape(message)
    if not settings:
        return words
    written = {name: "" if value is None else short(value) for name, value in settings.items()}
    return f"<p>{words}</p>{replacing(f'Use {change}', written, tuple(SETTINGS))}"


def failure(events: Sequence[Event]) -> str:
    """Why a run or a race ended early, from its last event; empty where it did not."""
    last = events[-1]
    if last["type"] != "error":
        return ""
    if last.get("cancelled"):
        return remarks(escape(last["message"]))
    said = refusal(last["message"], last.get("settings") or {}, last.get("change") or "")
    return f'<div class="problem">{said}</div>'
