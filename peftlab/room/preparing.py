"""A base model that is made ready while the page already answers."""

import contextlib
import gc
import importlib
import threading
import time
from collections.abc import Callable

from .. import hardware, seam
from ..base import fetching, weights
from ..data import tasks
from ..errors import plain
from ..resolve import resolve_here
from ..spec import RunSpec

PATIENCE = 1.0
"""Seconds between two looks whether somebody's job is over."""


class Preparation:
    """A base model being fetched and loaded in the background, so that the page need not wait for it.

    Then, while nobody waits for the machine, it is asked the held-out rows of the bundled tasks, so that no run has to.
    """

    def __init__(self, model: str, busy: Callable[[], bool] = lambda: False) -> None:
        """`busy` says whether somebody waits for this machine."""
        self.busy = busy
        self.spec = resolve_here(RunSpec(model=model))
        self.progress = fetching.Progress("looking", "")
        self.error: str | None = None
        self.ready_at: float | None = None
        """When that was, in seconds since 1970."""
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def ready(self) -> bool:
        return self.ready_at is not None

    def begin(self) -> None:
        """Starts, or starts again after an error; does nothing while under way or done."""
        if self.ready or (self._thread and self._thread.is_alive()):
            return
        self.error = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="prepare")
        self._thread.start()

    def stop(self) -> None:
        """Ends a download that is under way, and removes what it has left on the disk."""
        self._stopped.set()
        if self._thread and self.progress.stage != "loading":
            self._thread.join(5)

    def _work(self) -> None:
        try:
            with contextlib.closing(fetching.fetch(self.spec.model)) as stages:
                for told in stages:
                    self.progress = told if told.stage != "ready" else fetching.Progress("loading", told.detail)
                    if self._stopped.is_set():
                        return
            import torch  # noqa: F401

            seam.library()
            gc.collect()
            gc.freeze()  # libraries stay for good: looking through them each time held up everybody for a fifth of a second
            if hardware.is_shared():  # nothing is computed outside of a visitor's share
                importlib.import_module("peft")
                self.ready_at = time.time()
                return
            from ..run import warm_up

            weights.load(self.spec)
            warm_up(self.spec)
            self.ready_at = time.time()
            for task in tasks.TASKS.values():
                while not (self._stopped.is_set() or self._ask(task)):
                    self._stopped.wait(PATIENCE)
        except Exception as error:
            self.error = plain(error)

    def _ask(self, task: tasks.Task) -> bool:
        """Has the base answer a task's rows, unless somebody waits for the machine; whether it has."""
        from ..run.scoring import base_answers

        with contextlib.closing(base_answers(weights.load(self.spec), task)) as work:
            while not (self._stopped.is_set() or self.busy()):
                if next(work, None) is None:
                    return True
        return False
