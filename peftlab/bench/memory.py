"""Real training steps on a CUDA machine, their bytes and their seconds, beside what the trace predicts for them."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from .. import hardware
from ..base import models
from ..errors import RunError, SpecError, plain
from ..measured import provenance
from ..memory import exact
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import Say, steps, write
from .grid import graph_grid, grid

KEPT = ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "components")
"""What of a prediction is recorded."""
AT_ONCE, READY, ALONE = 6, 3, 3
"""Processes that predict, and that get models ready for the one that is timed; rows that are measured alone in any case."""
PRELOADED = ["torch", "transformers", "accelerate"]
"""What the processes share. peft is not among it: it imports bitsandbytes, which sets CUDA up, and that a fork cannot use."""
_turn: Any = None
"""In a process that times: the lock of whoever uses the GPU."""


def record_memory(out: Path, say: Say, at_once: int = 1) -> Json:
    """Runs the grid and writes every row to `out`, measured and predicted; what it has from this hardware stays.

    First the bytes of each row, each in a process of its own; several may run `at_once`, and what a whole process takes is
    told where none ran beside it. Then the seconds of each row, alone. A row that fails says so, and the others go on.

    Without a GPU nothing is measured, and the rows in `out` are predicted anew. Raises SpecError where it has none, and
    RunError where every row fails.
    """
    before: Json = {}
    if out.exists() and out.stat().st_size:  # the command line makes an empty one, to know that it can
        before = json.loads(out.read_text(encoding="utf-8"))
    if on_cpu := hardware.here().device != "cuda":
        if not before:
            raise SpecError("bench memory measures a CUDA GPU, and this machine has none; run it on one that has")
        old = before["rows"]  # the oldest recordings have no names
        names = [models.find(row["spec"]["model"]).name for row in old]
        document = before | {"rows": [{"name": n, "gear": "eager"} | row for n, row in zip(names, old, strict=True)]}
    else:
        document = provenance() | {"kind": "memory"}
        document |= {"rows": _rows(grid(), "eager", before), "graph_rows": _rows(graph_grid(), "graph", before)}
    recording = Recording(document | {"predicted_with": hardware.versions()}, out, say)
    predicting = threading.Thread(target=recording.predict)
    predicting.start()
    if not on_cpu:
        recording.measure(at_once)
    predicting.join()  # or it would slow the steps
    if not on_cpu:
        recording.time()
    if all("measured" not in row for row in document["rows"]):
        raise RunError(f"no configuration could be measured; the first said: {document['rows'][0]['error']}")
    return recording.document


def _rows(specs: Iterable[RunSpec], gear: str, before: Json) -> list[Json]:
    """A row for each of `specs`, with what was measured `before` on this hardware."""
    known: dict[str, Json] = {}
    if before.get("hardware") == hardware.here().name:
        old = [*before["rows"], *before.get("graph_rows", ())]
        known = {_key(row): row["measured"] for row in old if "measured" in row}
    rows: list[Json] = []
    for spec in map(resolve, specs):
        row: Json = {"name": models.find(spec.model).name, "gear": gear, "spec": spec.to_dict()}
        rows.append(row | ({"measured": known[_key(row)]} if _key(row) in known else {}))
    return rows


def _key(row: Json) -> str:
    return row.get("gear", "eager") + json.dumps(row["spec"], sort_keys=True)


class Recording:
    """A document of `bench memory` that is filled in, and written after each row."""

    def __init__(self, document: Json, out: Path, say: Say) -> None:
        self.document, self.out, self.say = document, out, say
        self.rows: list[Json] = document["rows"]
        self._writing = threading.Lock()

    def predict(self) -> None:
        """Traces every row's step. What cannot be predicted has an `error`."""
        with processes(AT_ONCE) as pool:
            asked = {pool.submit(exact, _spec(row)): row for row in self.rows}
            for done in as_completed(asked):
                row = asked[done]
                row.pop("predicted", None)
                try:
                    report = done.result().to_dict()
                    self._fill(row, predicted={name: report[name] for name in KEPT})
                except Exception as error:
                    self._fill(row, error=_reason(error))

    def measure(self, at_once: int) -> None:
        """Measures the bytes of the rows that have none, each in a process of its own, in an order that mixes their sizes."""
        rows = [row for row in self.rows if "measured" not in row]
        random.Random(0).shuffle(rows)
        before, again = _used_bytes(), []

        def run(row: Json, alone: bool) -> None:
            try:
                with processes(1) as process:
                    found = process.submit(steps.measure, _spec(row)).result()
                used, squeezed = found.pop("device_used_bytes") - before, found.pop("squeezed")
                if alone or not squeezed:
                    self._fill(row, measured=found | {"process_bytes": used if alone else None})
                    return
            except Exception as error:
                if alone:
                    self._fill(row, error=_reason(error))
                    return
            again.append(row)  # the others may have left too little of the GPU

        first = len(rows) if at_once == 1 else ALONE
        for row in rows[:first]:
            run(row, alone=True)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda row: run(row, alone=False), rows[first:]))
        for row in again:
            run(row, alone=True)

    def time(self) -> None:
        """Times the rows that are not, one after the other; while one is timed, the next models are built."""
        rows = [row for row in self.rows if "measured" in row] + self.document["graph_rows"]
        rows = [row for row in rows if not row.get("measured", {}).get("step_seconds")]
        died: list[Json] = []
        self._time(rows, READY, died)
        for row in died:  # itself, or another one of its process
            self._time([row], 1, [])

    def _time(self, rows: list[Json], at_once: int, died: list[Json]) -> None:
        with processes(at_once, _take_turns, _context().Lock()) as pool:
            asked = {pool.submit(timed, _spec(row), row["gear"]): row for row in rows}
            for done in as_completed(asked):
                row = asked[done]
                row.pop("untimed", None)
                try:
                    self._fill(row, measured=row.get("measured", {}) | done.result())
                except Exception as error:
                    died += [row] if isinstance(error, BrokenProcessPool) else []
                    self._fill(row, untimed=_reason(error))

    def _fill(self, row: Json, **found: Any) -> None:
        """Adds to a row, writes the document and says what is known of the row now."""
        for what in ("error", "untimed"):
            if what in found:  # with the model's name, since a key may be all of a config
                found[what] = found[what].replace(row["spec"]["model"], row["name"])
        with self._writing:
            row |= found
            if "measured" in row and ("predicted" in row or row["gear"] == "graph") and "error" not in found:
                row.pop("error", None)
            write(self.document, self.out)
            self.say(f"{row['name']} {row['spec']['method']}, {row['gear']}: {', '.join(_known(row))}")


def _known(row: Json) -> Iterator[str]:
    """What is known of a row, in words."""
    measured, predicted = row.get("measured", {}), row.get("predicted")
    if predicted and "peak_allocated_bytes" in measured:
        for quantity in KEPT[:2]:
            yield f"{quantity.split('_')[1]} {predicted[quantity] / measured[quantity] - 1:+.2%}"
    elif measured or predicted:
        yield "measured" if measured else "predicted"
    if seconds := measured.get("step_seconds"):
        yield f"{1000 * seconds:.1f} ms"
    yield from (row[what] for what in ("error", "untimed") if what in row)


def _spec(row: Json) -> Resolved:
    return resolve(RunSpec.from_dict(row["spec"]))


def _reason(error: Exception) -> str:
    return "the process died" if isinstance(error, BrokenProcessPool) else plain(error)


def _used_bytes() -> int:
    """Bytes of the GPU that are taken before anything is measured."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout) * 2**20


def processes(n: int, begin: Callable[..., None] | None = None, *given: Any) -> Executor:
    """So many fresh processes that share the imports, and no CUDA context; each calls `begin` with what is `given`."""
    return ProcessPoolExecutor(n, _context(), begin, given)


@cache
def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _take_turns(lock: Any) -> None:
    global _turn
    _turn = lock


def timed(spec: Resolved, gear: str) -> Json:
    """`steps.timed` of a run, in a process of `Recording.time`. Raises RunError with what went wrong."""
    model, why = steps.on_meta(spec), ""
    with _turn:
        try:
            return steps.timed(model, spec, gear, hardware.here().device)
        except Exception as error:
            why = plain(error)
        finally:
            del model
            steps.release()
    raise RunError(why)
