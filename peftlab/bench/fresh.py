"""What work takes in a process that is new to the GPU, as on a shared one."""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from .. import adapters, compare, seam
from ..base import fetching
from ..compare import proofs
from ..errors import RunError
from ..measured import provenance
from ..places import ASSETS
from ..resolve import resolve_here
from ..room import jobs
from ..run.events import Work
from ..run.generate import Decoding
from ..spec import Json, RunSpec
from . import Say, write

TIMES = 2
PROMPT = "My lamp arrived in two pieces. Noor Haddad"
ANSWER = Decoding(64)


def record_fresh(spec: RunSpec, out: Path, say: Say) -> Json:
    """Does each kind of work that the page does on a shared GPU, TIMES times, each in a process forked for it.

    The libraries are loaded before; the model is not. Raises RunError where one fails.
    """
    seam.library()
    importlib.import_module("peft")
    used = resolve_here(spec)
    list(fetching.fetch(used.model))
    adapter = adapters.read(ASSETS / "adapters" / "ticket-lora-r8")
    train, score = {"spec": used.to_dict()}, {"spec": used.to_dict(), "adapter": "", "folder": str(adapter.folder)}

    def answers() -> Iterable[object]:
        base, models = compare.models_of([adapter])
        ids = compare.prompt_tokens(base, compare.instruction_of(adapter), PROMPT, ANSWER)
        return compare.side_by_side(base, models, ids, ANSWER)

    works: dict[str, Callable[[Path], Iterable[object]]] = {
        "train": lambda folder: jobs.WORK["train"](train, folder, False),
        "score": lambda folder: jobs.WORK["score"](score, folder, False),
        "ask": lambda _: answers(),
        "merge": lambda _: [proofs.merge_check(adapter, PROMPT)],
        "dial": lambda _: proofs.dial(adapter, PROMPT),
        "latency": lambda _: Work(proofs.latency(adapter, PROMPT)),
    }
    document = provenance() | {"kind": "fresh", "spec": used.to_dict(), "rows": []}
    for name, work in works.items():
        took = [_forked(work) for _ in range(TIMES)]
        document["rows"].append({"what": name, "seconds": took})
        say(f"{name}: {statistics.median(took):.1f} s")
        write(document, out)
    return document


def _forked(work: Callable[[Path], Iterable[object]]) -> float:
    """Seconds that a work takes in a process of its own, from its start to its end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = context.Process(target=_do, args=(work, Path(folder) / "run", theirs))
        process.start()
        theirs.close()
        try:
            said = ours.recv()
        except EOFError:
            said = "its process ended"
        took = time.perf_counter() - began
        process.join()
    if said:
        raise RunError(f"work in a process of its own failed: {said}")
    return took


def _do(work: Callable[[Path], Iterable[object]], folder: Path, says: Connection) -> None:
    import torch

    torch.set_num_threads(1)  # as demos/page/gpu.py has it
    try:
        for _ in work(folder):
            pass
        says.send("")
    except Exception as error:
        says.send(f"{type(error).__name__}: {error}")
