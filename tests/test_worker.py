"""Long work beside the server's: once for equal questions, bounded, gone with the server, replaced when lost."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import wait_for

from peftlab.errors import PeftlabError
from peftlab.room import worker

pytest.importorskip("loky")


@pytest.fixture(autouse=True)
def forgotten():
    worker._futures.clear()
    yield
    worker._futures.clear()


def run(*works):
    async def all_of_them():
        return await asyncio.gather(*(worker.once(*work) for work in works))

    with ThreadPoolExecutor(1) as apart:  # the main thread may have a loop of its own: the browser tests leave one
        return apart.submit(asyncio.run, all_of_them()).result()


def test_equal_work_is_done_once_and_elsewhere():
    assert worker.known(os.getpid) is None
    one, other = run((os.getpid,), (os.getpid,))
    assert one == other == worker.known(os.getpid) != os.getpid()
    assert len(worker._futures) == 1
    assert run((os.getpriority, os.PRIO_PROCESS, 0)) == [min(19, os.getpriority(os.PRIO_PROCESS, 0) + worker.NICE)]


def test_what_the_work_raises_is_raised_and_not_kept():
    with pytest.raises(ZeroDivisionError):
        run((divmod, 1, 0))
    assert not worker._futures and worker.known(divmod, 1, 0) is None


def test_more_than_may_wait_is_refused(monkeypatch):
    monkeypatch.setattr(worker, "MOST", 2)
    with pytest.raises(PeftlabError, match="2 long computations wait already"):
        run(*[(time.sleep, 0.5 + n / 1000) for n in range(4)])


def test_the_oldest_results_are_forgotten(monkeypatch):
    monkeypatch.setattr(worker, "KEPT", 2)
    for n in range(4):
        run((abs, -n))
    assert [worker.known(abs, -n) for n in range(4)] == [None, None, 2, 3]


def test_a_lost_process_is_replaced():
    (pid,) = run((os.getpid,))
    os.kill(pid, signal.SIGKILL)
    worker._futures.clear()
    (other,) = run((os.getpid,))
    assert other != pid
    with pytest.raises(PeftlabError, match="lost twice"):
        run((os._exit, 1))


def test_it_ends_with_the_server_even_when_that_is_killed():
    code = (
        "import asyncio, os, time; from peftlab.room import worker; print(asyncio.run(worker.once(os.getpid)), flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        pid = int(server.stdout.readline())
        server.kill()
    wait_for(lambda: not _lives(pid))


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
