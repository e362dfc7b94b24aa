"""What can go wrong, as one tree. Every message states the value, the limit and the fix."""

from __future__ import annotations

import re
from collections.abc import Mapping


class PeftlabError(Exception):
    """Base of every error that is meant to be read by a person."""


class SpecError(PeftlabError, ValueError):
    """A setting that cannot be run as asked: exit status 2."""


class Curable(PeftlabError):
    """An error with its cure, so that a page can offer it."""

    def __init__(self, message: str = "", settings: Mapping[str, object] | None = None, change: str = "") -> None:
        super().__init__(message)
        self.settings = settings or {}
        """Settings with which the run goes well, None for an automatic one; empty where none are known."""
        self.change = change
        """These settings in words."""


class DoesNotFit(Curable, SpecError):
    """A run that needs more memory than is free."""


class NotHere(Curable, SpecError):
    """A run that this host does not do."""


class WeightsError(PeftlabError):
    """A base model that could not be found, fetched or verified."""


class AdapterError(PeftlabError):
    """An adapter folder that cannot be read or does not fit its base."""


class RunError(PeftlabError):
    """A run that failed after it started."""


class Interrupted(RunError):
    """A run that the machine has ended or has not begun, and that can go on."""


class Diverged(Curable, RunError):
    """A run whose loss or gradient is no use any more."""


def plain(error: Exception) -> str:
    """An error as a page says it: one of ours as it is, any other in one line."""
    if isinstance(error, PeftlabError):
        return str(error)
    text = str(error).splitlines()[0][:300] if str(error) else ""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text, re.IGNORECASE):
        return f"out of memory ({text}): lower batch-size, or turn gradient-checkpointing on"
    if "No space left on device" in text:  # safetensors says it in an error of its own
        return f"the disk is full ({text}): free some space where runs are kept, then start again"
    return f"{type(error).__name__}: {text}"
