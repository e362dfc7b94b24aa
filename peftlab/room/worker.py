"""Long work in one process beside the server's, which gives way to it: traces of training steps and decompositions.

Equal work is done once, and its result kept. The process begins with the first work, ends with the server's, and is replaced
when it is lost.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..errors import PeftlabError

MOST = 64
"""Works that may wait. Another one is refused."""
KEPT = 512
"""Results that are kept, the newest."""
NICE = 10
"""How far the process gives way to the server's."""

_futures: OrderedDict[Any, Future] = OrderedDict()
_lock = threading.Lock()


def known(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work(*arguments)`, if it has been done here; else None."""
    future = _futures.get((work, arguments))
    return future.result() if future and future.done() and not future.exception() else None


async def once(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work(*arguments)`: a function of a module, of arguments that can be hashed and pickled.

    Whoever waits holds no thread. Raises what the work raises, and PeftlabError when too many wait or the process is
    lost twice.
    """
    for _ in range(2):
        future = _begun(work, arguments)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except Exception as error:
            with _lock:
                if _futures.get((work, arguments)) is future:
                    del _futures[work, arguments]
            if not _is_lost(error):
                raise
    raise PeftlabError("the process that does long work was lost twice; try again, or with a smaller model")


def _begun(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Future:
    key = (work, arguments)
    with _lock:
        if key in _futures:
            _futures.move_to_end(key)
            return _futures[key]
        waiting = sum(not future.done() for future in _futures.values())
        if waiting >= MOST:
            raise PeftlabError(f"{waiting} long computations wait already; try again in a minute")
        future = _futures[key] = _process().submit(work, *arguments)
        for old in list(_futures)[:-KEPT]:
            if _futures[old].done():
                del _futures[old]
        return future


def _process() -> Any:
    from loky import get_reusable_executor

    return get_reusable_executor(max_workers=1, timeout=None, initializer=_begin, initargs=(os.getpid(),))


def _begin(server: int) -> None:
    from ..seam import quiet

    os.nice(NICE)
    quiet()
    threading.Thread(target=_end_with, args=(server,), daemon=True, name="end-with-server").start()


def _end_with(server: int) -> None:
    while os.getppid() == server:
        time.sleep(1)
    os._exit(0)


def _is_lost(error: Exception) -> bool:
    """Whether the process ended under the work."""
    from concurrent.futures.process import BrokenProcessPool

    return isinstance(error, BrokenProcessPool)
