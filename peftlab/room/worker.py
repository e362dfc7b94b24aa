"""Long work (traces, decompositions), each once, in a process beside the server's, which is replaced when it is lost."""

import asyncio
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ..errors import PeftlabError

MOST = 64
"""So many works may wait; another one is refused."""
KEPT = 512
"""So many results are kept, the newest."""
NICE = 10
"""How far the process gives way to the server's."""
Result = TypeVar("Result")

_futures: OrderedDict[Hashable, Future] = OrderedDict()
_lock = threading.Lock()


def known(work: Callable[..., Result], *arguments: Hashable) -> Result | None:
    """The result of `work(*arguments)`, if it has been done here; else None."""
    future = _futures.get((work, arguments))
    return future.result() if future and future.done() and not future.exception() else None


def busy() -> bool:
    """Whether something is under way."""
    with _lock:
        return any(not future.done() for future in _futures.values())


async def once(work: Callable[..., Result], *arguments: Hashable) -> Result:
    """The result of `work(*arguments)`. The work is a function of a module; its arguments can be hashed and pickled.

    Waiting for it takes no thread. Raises what the work raises, and PeftlabError when too many wait or the process is lost
    twice.
    """
    for _ in range(2):
        future = _begun(work, arguments)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except Exception as error:
            with _lock:
                if _futures.get((work, arguments)) is future:
                    del _futures[work, arguments]
            if not isinstance(error, BrokenProcessPool):
                raise
    raise PeftlabError("the process that does long work was lost twice; try again, or with a smaller model")


def _begun(work: Callable[..., Result], arguments: tuple[Hashable, ...]) -> Future[Result]:
    from loky import get_reusable_executor

    key = (work, arguments)
    with _lock:
        if key in _futures:
            _futures.move_to_end(key)
            return _futures[key]
        waiting = sum(not future.done() for future in _futures.values())
        if waiting >= MOST:
            raise PeftlabError(f"{waiting} long computations wait already; try again in a minute")
        process = get_reusable_executor(max_workers=1, timeout=None, initializer=_begin, initargs=(os.getpid(),))
        future = _futures[key] = process.submit(work, *arguments)
        for old in list(_futures)[:-KEPT]:
            if _futures[old].done():
                del _futures[old]
        return future


def _begin(server: int) -> None:
    from ..seam import quiet

    os.nice(NICE)
    quiet()
    threading.Thread(target=_end_with, args=(server,), daemon=True, name="end-with-server").start()


def _end_with(server: int) -> None:
    while os.getppid() == server:
        time.sleep(1)
    os._exit(0)
