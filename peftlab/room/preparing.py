"""A base model that is made ready while the page already answers."""

import contextlib
import gc
import threading

from ..base import fetching, weights
from ..errors import plain
from ..resolve import resolve_here
from ..run import warm_up
from ..spec import RunSpec


class Preparation:
    """A base model being fetched and loaded in the background, so that the page need not wait for it."""

    def __init__(self, model: str) -> None:
        self.spec = resolve_here(RunSpec(model=model))
        self.progress = fetching.Progress("looking", "")
        self.error: str | None = None
        self.ready = False
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

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
            weights.load(self.spec)
            warm_up(self.spec)
            gc.collect()
            gc.freeze()  # what stays for good is looked through no more: that held up everybody for a fifth of a second
            self.ready = True
        except Exception as error:
            self.error = plain(error)
