"""How reliably a recipe works: one run a seed, each scored on every held-out row that its task has, and how long one waits."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from .. import adapters
from ..base import weights
from ..compare import score_of
from ..data import tasks
from ..errors import RunError
from ..measured import provenance
from ..resolve import resolve_here
from ..run import train, warm_up
from ..run.events import Work
from ..run.scoring import answer, base_answers
from ..spec import Json, Resolved, RunSpec
from . import Say, peers, write


def record_reliability(spec: RunSpec, out: Path, say: Say, seeds: int, beside: bool = False) -> Json:
    """Runs `spec` on so many seeds, from its own on, and writes the scores and seconds to `out` after each run.

    A run is scored on the task's held-out rows and on its further ones, 0 to 1. The wait is that of a visitor: from the
    press to the final score, the model loaded and the base's own answers known, as a server prepares them. With `beside`,
    Trainer trains and is scored alike in the same process, for the wait alone. Raises RunError where a run fails.
    """
    used = resolve_here(spec)
    task, base = tasks.find(used.task), weights.load(used)
    rows = replace(task, heldout=task.heldout + task.more)
    warm_up(used)
    Work(base_answers(base, task)).finished()
    document = provenance() | {"kind": "reliability", "spec": used.to_dict(), "items": len(rows.heldout), "runs": []}
    for seed in range(used.seed, used.seed + seeds):
        found = _run(replace(used, seed=seed), rows)
        document["runs"].append(found)
        say(f"seed {seed}: {100 * found['score']:.1f}% of {len(rows.heldout)}, {found['wait_seconds']:.1f} s")
        scores = [run["score"] for run in document["runs"]]
        waits = [run["wait_seconds"] for run in document["runs"]]
        document |= {"mean": statistics.fmean(scores), "worst": min(scores), "wait_seconds": statistics.median(waits)}
        write(document, out)
    if beside:
        document["trainer"] = _beside(used)
        say(f"{peers.YARDSTICK}: {document['trainer']['wait_seconds']:.1f} s")
    return write(document, out)


def _run(spec: Resolved, rows: tasks.Task) -> Json:
    """One run as the page does it, then the score of all rows."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        scored, done = 0.0, None
        for event in train(spec, Path(folder) / "run"):
            if event["type"] == "eval":
                scored = time.perf_counter() - began
            done = event
        if done is None or done["type"] != "done" or not done["adapter"]:
            raise RunError("the run ended before it had learned anything; nothing was recorded")
        base = weights.load(spec)
        model = adapters.apply(base, adapters.read(done["adapter"]))
        answers = Work(answer(model, base.tokenizer, rows, rows.heldout)).finished()
    score = score_of("run", [a.score for a in answers])
    return {
        "seed": spec.seed, "score": score.mean, "low": score.low, "high": score.high, "wait_seconds": scored,
        "training_seconds": done["training_seconds"], "heldout_score": next(iter(done["eval"]["after"].values())),
        "train_loss": done["train_loss"], "forgetting": done["forgetting"],
    }  # fmt: skip


def _beside(spec: Resolved) -> Json:
    """The same by Trainer: attached, trained and scored once, on the rows that a run of ours scores at its end."""
    began = time.perf_counter()
    found = peers.PEERS[peers.YARDSTICK].run(spec)
    return {"wait_seconds": time.perf_counter() - began, "training_seconds": found["training_seconds"]}
