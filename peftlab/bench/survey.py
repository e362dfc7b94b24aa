"""A survey of all families that transformers knows: a tiny model of each is counted, traced, trained, and asked for text."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import adapters, hardware, methods, seam
from ..base import architecture, configs, weights
from ..count import count
from ..errors import PeftlabError, SpecError
from ..measured import provenance
from ..memory import exact, predict
from ..methods import METHODS
from ..resolve import resolve, resolve_here
from ..run import train
from ..run.generate import Decoding, decode
from ..spec import Json, Resolved, RunSpec
from . import Say, families

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")
LIMIT = 240.0
"""Seconds that a family has."""
STAGES = ("counted", "traced", "trained", "applied", "generated", "closed_form")
"""What a row says of a family, in the order in which it is tried. The first alone is tried where text is not written."""
SIZES = {"rank": 4, "virtual_tokens": 5, "bottleneck": 8, "block_size": 16}
"""Settings of the adapters, where a method has them: small enough for every tiny model."""
STEP: Json = {"batch_size": 2, "sequence_length": 64, "precision": "bf16", "gpu": "h100-80gb"}
USUAL: Json = STEP | {"sequence_length": 512}
"""The step of a tiny model, and that of a model of usual size, at which the closed form is compared with the trace."""
WITHIN = 0.05
"""How far from the trace the closed form may be, as a share."""
RIGHT, UNKNOWN, SIZELESS = "ok", "unknown", "its defaults make no model"
VISIBLE = "CUDA_VISIBLE_DEVICES"
PRELOADED = ["torch", "transformers"]
"""What the processes share. peft is not among it: it imports bitsandbytes, which sets CUDA up, and that a fork cannot use."""
SCRATCH = re.compile(re.escape(tempfile.gettempdir()) + r"/tmp\w+/")
"""Where a family's tiny model is meanwhile."""
COLOURS = {"sky": "blue", "grass": "green", "rose": "red", "sea": "blue"}
TASK: Json = {
    "name": "Colours", "teaches": "Colours.", "instruction": "Name a colour.", "metric": "exact_match", "steps": 2,
    "batch_size": 2, "sequence_length": 96, "max_new_tokens": 4,
    "train": [{"prompt": f"what colour is the {thing}?", "answer": colour} for thing, colour in COLOURS.items()],
    "heldout": [{"prompt": "and the cherry?", "answer": "red"}],
}  # fmt: skip


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Hides GPUs from what is imported and started meanwhile."""
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ""
    hardware.here.cache_clear()
    try:
        yield
    finally:
        del os.environ[VISIBLE]
        os.environ |= {} if before is None else {VISIBLE: before}
        hardware.here.cache_clear()


@_without_gpu()
def record_families(out: Path, say: Say, only: Sequence[str] | None = None, jobs: int = 1, again: bool = False) -> Json:
    """Surveys all families, or `only` these, each in a process of its own, and writes their rows to `out` as they come.

    Rows that are there, of the same versions of the libraries, are kept, unless `again`. Raises SpecError for an unknown
    family.
    """
    wanted = [(kind, task) for task in families.TASKS for kind in families.kinds(task) if not only or kind in only]
    if odd := set(only or ()) - {kind for kind, _ in wanted}:
        raise SpecError(f"family={', '.join(sorted(odd))}: transformers has no such family; name one such as llama")
    document, rows = provenance() | {"kind": "families"}, {}
    if out.exists() and out.stat().st_size:
        had = json.loads(out.read_text(encoding="utf-8"))
        rows = {_key(row): row for row in had["rows"] if had["versions"] == document["versions"]}
    left = [key for key in wanted if again or key not in rows]
    with ThreadPoolExecutor(jobs) as pool:
        for work in as_completed([pool.submit(apart, *key) for key in left]):
            row = json.loads(SCRATCH.sub("", json.dumps(work.result())))
            rows[_key(row)] = row
            say(f"{row['family']}, {row['task']}: {'; '.join(_faults(row)) or RIGHT}")
            _write(document | {"totals": totals([*rows.values()])}, rows, out)
    document["totals"] = totals([*rows.values()])
    _write(document, rows, out)
    return document | {"rows": [*rows.values()]}


def _key(row: Json) -> tuple[str, str]:
    return row["family"], row["task"]


def _write(document: Json, rows: dict[tuple[str, str], Json], out: Path) -> None:
    """As other recordings, with a row in each line: so a change is seen family by family."""
    head = json.dumps(document, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(rows[key]) for key in sorted(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _faults(row: Json) -> Iterator[str]:
    """What is not right of a family, in words."""
    reasons: dict[str, list[str]] = {}
    for method, said in row.get("methods", {}).items():
        reasons.setdefault(said, []).append(method)
    yield from (f"{' '.join(found)}: {said}" for said, found in reasons.items())
    tried = ((stage, row[stage]) for stage in STAGES if stage in row)
    yield from (
        f"{stage}: {said}" for stage, said in tried if isinstance(said, str) and said not in (RIGHT, UNKNOWN, SIZELESS)
    )


def totals(rows: Sequence[Json]) -> Json:
    """How many families there are of each task, how many of them are right in each stage, and what is refused."""
    found: Json = {}
    for task in families.TASKS:
        of_task = [row for row in rows if row["task"] == task]
        needed = STAGES[:3] if task == "causal" else STAGES[:1]
        supported = sum(all(row.get(stage) == RIGHT for stage in needed) for row in of_task)
        right = {stage: sum(row.get(stage) == RIGHT for row in of_task) for stage in STAGES[:-1]}
        said = Counter(word for row in of_task for word in {v.split(":")[0] for v in _verdicts(row)})
        refused = Counter(m for row in of_task for m, v in row.get("methods", {}).items() if v.startswith("refused"))
        found[task] = {
            "families": len(of_task), "supported": supported, **{stage: n for stage, n in right.items() if n},
            "with_something_wrong": said["wrong"],
            "refused": dict(sorted(refused.items())),
        }  # fmt: skip
    errors = [row["closed_form"] for row in rows if isinstance(row.get("closed_form"), float)]
    found["closed_form"] = {
        "within": sum(abs(error) <= WITHIN for error in errors),
        "beyond": sum(abs(error) > WITHIN for error in errors),
        UNKNOWN: sum(row.get("closed_form") == UNKNOWN for row in rows),
    }
    return found


def _verdicts(row: Json) -> list[str]:
    return [v for v in (*row.get("methods", {}).values(), *(row.get(s) for s in STAGES)) if isinstance(v, str)]


def worse(before: Sequence[Json], after: Sequence[Json]) -> list[str]:
    """What was right in the rows of one survey and is not in another's, in words. Families that are gone are left out."""
    now, found = {_key(row): row for row in after}, []
    for row in before:
        if (new := now.get(_key(row))) is None:
            continue
        pairs = {stage: (row.get(stage), new.get(stage)) for stage in STAGES[:-1]}
        pairs |= {m: (v, new.get("methods", {}).get(m)) for m, v in row.get("methods", {}).items()}
        found += [f"{'/'.join(_key(row))} {what}: {new}" for what, (old, new) in pairs.items() if old == RIGHT != new]
        error = new.get("closed_form")
        if isinstance(error, float) and abs(error) > WITHIN and row.get("closed_form") != error:
            found.append(f"{'/'.join(_key(row))} closed form: {error:.1%} from the trace")
    return found


def apart(kind: str, task: str) -> Json:
    """The row of a family, made in a process of its own, which has LIMIT seconds."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_send, args=(kind, task, theirs), daemon=True)
    process.start()
    theirs.close()
    row: Json = {"family": kind, "task": task}
    until = time.monotonic() + LIMIT
    try:
        while ours.poll(max(0.0, until - time.monotonic())):
            row = ours.recv()
    except EOFError:
        process.join()
    ended = process.exitcode
    process.kill()
    if ended != 0:
        stage = next((stage for stage in STAGES if stage not in row), STAGES[-1])
        row[stage] = f"wrong: not done in {LIMIT:g} s" if ended is None else f"wrong: its process ended with {ended}"
    return row


def _send(kind: str, task: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    for row in look(kind, task):
        pipe.send(row)


def look(kind: str, task: str) -> Iterator[Json]:
    """The row of a family, each time with one more stage: RIGHT, or `refused: ` or `wrong: ` with the reason.

    `closed_form` is its error against the trace, as a share, UNKNOWN where it does not answer for the family, or SIZELESS.
    """
    row: Json = {"family": kind, "task": task}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / kind
        row["counted"], model = _tried(lambda: _saved(kind, task, folder))
        if model is None:
            yield row
            return
        row["methods"] = {method: _tried(partial(_counted, model, str(folder), method))[0] for method in METHODS}
        needed = [row["methods"][method] for method in ("full", "lora")]
        row["counted"] = next((said for said in needed if said != RIGHT), RIGHT)
        yield row
        if task != "causal":
            return
        row["traced"], _ = _tried(
            lambda: [exact(resolve(_spec(str(folder), method, **STEP))) for method in ("lora", "full")]
        )
        yield row
        row["trained"], adapter = _tried(lambda: _trained(folder, Path(scratch) / "adapter"))
        yield row
        if adapter is not None:
            row["applied"], applied = _tried(lambda: _applied(adapter))
            if applied is not None:
                row["generated"], _ = _tried(lambda: list(decode(applied, [[5, 6, 7], [8, 9]], -1, Decoding(4))))
            yield row
        said, error = _tried(lambda: _closed_form_error(kind, task, Path(scratch)))
        row["closed_form"] = error if said == RIGHT else said
        yield row


def _tried(work: Callable[[], Result]) -> tuple[str, Result | None]:
    """(RIGHT, or what it says and whether that is a refusal; what `work` returns)"""
    try:
        return RIGHT, work()
    except PeftlabError as error:
        return f"refused: {error}", None
    except AssertionError as error:
        return f"wrong: {error}", None
    except Exception as error:
        return f"wrong: {configs.shown(f'{type(error).__name__}: {error}', 200)}", None


def _saved(kind: str, task: str, folder: Path) -> PreTrainedModel:
    """The tiny model of a family, which is also written to the folder."""
    cls = configs.parsed(families.tiny(kind, task))[1]
    return cls.from_pretrained(families.save(kind, folder, task)).requires_grad_(False)


def _spec(model: str, method: str, **settings: Any) -> RunSpec:
    used: Json = {name: size for name, size in SIZES.items() if name in METHODS[method].settings}
    return RunSpec(model=model, method=method, **used, **settings)


def _counted(model: PreTrainedModel, name: str, method: str) -> None:
    """Raises AssertionError where a method trains another number of parameters than are counted."""
    spec = resolve(_spec(name, method, precision="fp32", sequence_length=96))
    counted = count(spec).trainable_parameters
    whole = resolve(
        _spec(name, "lora" if method == "qlora" else method, precision="fp32", sequence_length=96)
    )  # a CPU has no NF4 base
    targets = methods.targets(architecture.of(name), whole)
    adapted = methods.find(whole.method).attach(weights.share(model), targets, whole)
    attached = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert attached == counted, f"{counted:,} are counted, {attached:,} attached"


def _trained(folder: Path, out: Path) -> tuple[Resolved, Path]:
    """(the run, the adapter) after two steps."""
    task = folder / "colours.json"
    task.write_text(json.dumps(TASK))
    spec = resolve_here(_spec(str(folder), "lora", task=str(task), precision="fp32"))
    events = list(train(spec, out))
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert len(losses) == TASK["steps"] and all(map(math.isfinite, losses)), f"its losses are {losses}"
    return spec, Path(str(events[-1]["adapter"]))


def _applied(run: tuple[Resolved, Path]) -> PreTrainedModel:
    """The base with the adapter on it. Raises AssertionError where it says what the base does, or another size was saved."""
    from safetensors.torch import load_file

    spec, folder = run
    base = weights.load(spec)
    saved, counted = (
        sum(t.numel() for t in load_file(folder / adapters.TENSORS).values()),
        count(spec).trainable_parameters,
    )
    assert saved == counted, f"{counted:,} are counted, {saved:,} saved"
    model = adapters.apply(base, adapters.read(folder))
    ids = torch.tensor([[5, 6, 7, 8]], device=base.model.device)
    with torch.no_grad():
        own, other = (seam.logits(m, input_ids=ids) for m in (base.model, model))
    assert other.isfinite().all() and not torch.equal(own, other), "the adapter changes nothing, or gives no numbers"
    return model


def _closed_form_error(kind: str, task: str, folder: Path) -> float | str:
    """By which share the closed form is off the trace, for a model with the family's own default sizes."""
    if (file := _usual(kind, task, folder)) is None:
        return SIZELESS
    spec = resolve(_spec(str(file), "lora", **USUAL))
    if (predicted := predict(spec).allocated) is None:
        return UNKNOWN
    traced = exact(spec).allocated
    assert traced, "the trace says nothing"
    return round(predicted / traced - 1, 4)


def _usual(kind: str, task: str, folder: Path) -> Path | None:
    """A file in the folder with a config of the family's default sizes; None where transformers builds no model of those."""
    for number, config in enumerate(families.usual(kind, task)):
        file = folder / f"usual-{number}.json"
        file.write_text(json.dumps(config))
        with suppress(SpecError):
            architecture.of(str(file))
            return file
    return None
