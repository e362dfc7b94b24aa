"""A run under way, kept in one file, so that a run whose process was killed goes on to what it would have become.

The file is safetensors; what is no tensor is JSON in its header. A new one is written beside it and takes its place at once:
whenever the process ends, there is one whole file or none. On a CPU a resumed run is, bit for bit, the run that was not
interrupted, because batches and dropout come from the seed and the number of the step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import adapters
from ..errors import AdapterError, SpecError
from ..spec import Json, Resolved
from .files import CHECKPOINT, STOP

if TYPE_CHECKING:
    from .loop import Run

FORMAT = 1
"""Goes up with each change of the file that an older version cannot read."""
SHARE = 0.05
"""The largest share of the training time that goes into checkpoints."""
SOONEST = 2.0
"""Seconds of training before the first checkpoint, and between two."""
WRITTEN = 500e6
"""Bytes a second that a disk is taken to write, until one checkpoint was timed."""
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA keeps of each parameter outside the model, for its next cut of ranks."""
INSIDE = "base_model.model."
"""What the names of those parameters begin with, seen from the whole model."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Checkpoint:
    """The checkpoint of one run: when it is due, how it is written, and how the run is put back to it."""

    def __init__(self, run: Run) -> None:
        self.run, self.file = run, run.out / CHECKPOINT
        self.trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        self.allocator = getattr(run.model.base_model, "rankallocator", None)
        """AdaLoRA's, which keeps scores of parameters and their ranks outside the model."""
        self.given_up = False
        self.written_at = 0.0
        """Seconds of training that the run had taken when it last wrote one."""
        self.costs = 0.0
        """Seconds that the last one took to write."""

    def due(self) -> bool:
        """Whether enough training has passed since the last one for it to stay within its SHARE."""
        costs = self.costs or sum(t.nbytes for t in self._tensors().values()) / WRITTEN
        return self.run.training_seconds - self.written_at >= max(SOONEST, costs / SHARE)

    def keep(self, evaluation: Json) -> str:
        """Writes the run as it is between two steps. Returns why that cannot be, once; from then on nothing is written."""
        if self.given_up:
            return ""
        began = time.perf_counter()
        try:
            if why := self._unsuited():
                raise OSError(errno.EINVAL, why)
            self._write(evaluation)
        except OSError as error:  # training is worth more than its checkpoint
            self.given_up = True
            self.file.with_name(CHECKPOINT + ".part").unlink(missing_ok=True)
            why = error.strerror or type(error).__name__
            after = "if this run is interrupted, it goes on from an earlier step, or from the beginning"
            return f"No more checkpoints are kept ({why}): {after}."
        self.costs, self.written_at = time.perf_counter() - began, self.run.training_seconds
        return ""

    def remove(self) -> None:
        """Leaves none: the run has come to its end, or begins anew."""
        for file in (self.file, self.file.with_name(CHECKPOINT + ".part")):
            file.unlink(missing_ok=True)

    def resume(self) -> tuple[Json, str]:
        """Puts the run back to its checkpoint. Returns the evaluations up to then, or else why it starts from the beginning."""
        from safetensors import SafetensorError, safe_open

        if not self.file.exists():
            return {}, "there is no checkpoint"
        try:
            saved = safe_open(self.file, "pt")
            state = _state_of(saved)
            self._check(saved, state)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:  # torn, or of another run
            return {}, f"the checkpoint cannot be used ({' '.join(str(error).split())[:160]})"
        self._put_back(saved, state)
        return state["evaluation"], ""

    def _write(self, evaluation: Json) -> None:
        """Tensor by tensor, since safetensors' own function would first hold all of them in main memory. Raises OSError."""
        tensors, metadata = self._tensors(), {"state": json.dumps(self._state(evaluation))}
        header: Json = {"__metadata__": metadata}
        end = 0  # of the tensors so far, in bytes
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if shutil.disk_usage(self.run.out).free < 2 * end:  # the adapter is to have room, too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = self.file.with_name(CHECKPOINT + ".part")
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                with self.run.gear.order():
                    own = tensor.detach().cpu().contiguous()
                file.write(own.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.file)
        if os.name == "posix":  # a folder cannot be opened on Windows
            folder = os.open(self.run.out, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _unsuited(self) -> str:
        """What this file has no place for; empty where the run can be kept."""
        step = self.run.gear.step
        if step.method.after_step and not self.allocator:
            return f"{step.method.name} keeps more than its parameters"
        values = [value for state in step.optimizer.state.values() for value in state.values()]
        odd = [
            v for v in values if not (v is None or isinstance(v, int | float) or getattr(v, "dtype", None) in DTYPES)
        ]
        return f"the optimizer {self.run.spec.optimizer} keeps a {type(odd[0]).__name__}" if odd else ""

    def _live(self) -> dict[str, Tensor]:
        """The trained parameters and the optimizer's tensors of them, by what the file calls them."""
        found: dict[str, Tensor] = {f"parameter/{name}": p for name, p in self.trained.items()}
        for name, state in self._optimizer_state().items():
            found |= {f"optimizer/{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        return found

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter that it has moved."""
        state = self.run.gear.step.optimizer.state
        return {name: state[p] for name, p in self.trained.items() if p in state}

    def _tensors(self) -> dict[str, Tensor]:
        """All that is written: the live ones, the last sound parameters, and AdaLoRA's scores."""
        sound = {f"sound/{n}": t for n, t in zip(self.trained, self.run.snapshots.sound[1], strict=False)}
        return {**self._live(), **sound, **self._scores()}

    def _scores(self) -> dict[str, Tensor]:
        """AdaLoRA's, by what the file calls them; it has none before its first step and after its last cut."""
        tables = {kind: getattr(self.allocator, kind) for kind in SCORES if self.allocator}
        return {f"{kind}/{name}": score for kind, table in tables.items() for name, score in table.items()}

    def _state(self, evaluation: Json) -> Json:
        """What is written beside the tensors."""
        run = self.run
        ranks = self.allocator.peft_config.rank_pattern if self.allocator else None
        numbers = {
            name: {key: value for key, value in state.items() if isinstance(value, int | float)}
            for name, state in self._optimizer_state().items()
        }
        return {
            "format": FORMAT, "spec": run.spec.to_dict(), "task": _digest(run), "step": run.steps_done,
            "losses": run.losses, "tokens": run.tokens, "largest": run.largest, "seconds": time.perf_counter() - run.began,
            "training_seconds": run.training_seconds, "hopeless": run.snapshots.hopeless, "sound": run.snapshots.sound[0],
            "numbers": numbers, "scores": list(self._scores()), "ranks": ranks, "evaluation": evaluation,
        }  # fmt: skip

    def _check(self, saved: Any, state: Json) -> None:
        """Raises ValueError or KeyError, with the run as it was, for a file that is not of this run or does not fit it."""
        if other := _difference(state["spec"], self.run.spec):
            raise ValueError(f"its run has {other}")
        if state["task"] != _digest(self.run):
            raise ValueError("its task had other rows")
        optimizer = self.run.gear.step.optimizer
        try:
            if odd := set(state["numbers"]) - set(self.trained):
                raise ValueError(f"{min(odd)} is in the file only")
            self._make_optimizer_state(list(state["numbers"]))
            needed = self._live()
            if state["sound"]:
                needed |= {f"sound/{name}": p for name, p in self.trained.items()}
            needed |= {key: self.trained[INSIDE + key.split("/")[1]] for key in state["scores"]}
            names = set(saved.keys())
            if odd := names ^ set(needed):
                raise ValueError(f"{min(odd)} is in the {'file' if min(odd) in names else 'run'} only")
            for name in names:
                part, tensor = saved.get_slice(name), needed[name]
                if (part.get_shape(), part.get_dtype()) != (list(tensor.shape), DTYPES[tensor.dtype]):
                    raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}")
        except (ValueError, KeyError):
            optimizer.state.clear()
            raise

    def _make_optimizer_state(self, names: Sequence[str]) -> None:
        """Has the optimizer make what it keeps of these parameters, which it does at its first step, where it belongs.

        For a CUDA graph that has to be before its recording. At a rate of 0 and without gradients nothing is moved.
        """
        step = self.run.gear.step
        with self.run.gear.order():
            step.set_rate(0.0)
            for name in names:
                self.trained[name].grad = torch.zeros_like(self.trained[name])
            if names:
                step.optimizer.step()
            step.optimizer.zero_grad(set_to_none=True)

    def _put_back(self, saved: Any, state: Json) -> None:
        run, snapshots, allocator = self.run, self.run.snapshots, self.allocator
        with run.gear.order(), torch.no_grad():
            for name, tensor in self._live().items():
                tensor.copy_(saved.get_tensor(name))
            if state["sound"]:
                sound = [saved.get_tensor(f"sound/{name}").to(snapshots.device) for name in self.trained]
                snapshots.sound = state["sound"], sound
            if state["step"] % snapshots.every == 0:
                snapshots.take(state["step"])
        for name, kept in self._optimizer_state().items():
            kept.update(state["numbers"][name])
        if allocator:
            allocator.peft_config.rank_pattern = state["ranks"]
            for kind, name in (score.split("/") for score in state["scores"]):
                getattr(allocator, kind)[name] = saved.get_tensor(f"{kind}/{name}").to(run.base.device)
        snapshots.hopeless = state["hopeless"]
        run.steps_done = run.gear.step.done = state["step"]
        run.losses, run.tokens, run.largest = state["losses"], state["tokens"], tuple(state["largest"])
        run.training_seconds = self.written_at = state["training_seconds"]
        run.began = time.perf_counter() - state["seconds"]


def must_go_on(spec: Resolved, out: Path) -> None:
    """Raises SpecError where `out` holds no run of this spec that can go on. One that was killed early has left it empty."""
    from safetensors import SafetensorError, safe_open

    anew = "give its own folder and settings, or leave resume out to start anew"
    if not out.is_dir():
        raise SpecError(f"out={out}: there is no run to resume; {anew}")
    ours = {CHECKPOINT, f"{CHECKPOINT}.part", STOP, *(f"adapter{end}" for end in ("", ".part", ".old"))}
    if (names := {file.name for file in out.iterdir()}) and not names & ours:
        raise SpecError(f"out={out}: there is no run in this folder; {anew}")
    found: Json | None = None
    with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):  # then training says so
        found = _state_of(safe_open(out / CHECKPOINT, "pt"))["spec"]
    if found is None:
        with suppress(AdapterError):
            kept = adapters.read(out / "adapter")
            found = kept.spec.to_dict()
            if kept.result.get("stopped") is False and not _difference(found, spec):
                raise SpecError(f"out={out}: its run has come to its end; leave resume out to train again")
    if found is not None and (other := _difference(found, spec)):
        raise SpecError(f"out={out}: its run has {other}; {anew}")


def _state_of(saved: Any) -> Json:
    """The JSON of an open file. Raises ValueError for a file of something else."""
    state = json.loads((saved.metadata() or {}).get("state", "null"))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("another version wrote it")
    return state


def _difference(found: Json, spec: Resolved) -> str:
    """A setting that a run's spec has otherwise than `spec`, in words; empty where there is none."""
    own = json.loads(json.dumps(spec.to_dict()))
    name = next((n for n in sorted({*found, *own}) if found.get(n) != own.get(n)), None)
    return f"{name.replace('_', '-')}={found.get(name)} (not {own.get(name)})" if name else ""


def _digest(run: Run) -> str:
    """Of the rows that the run learns from and is tested on: a file may have changed under its name."""
    return hashlib.sha256(repr(run.task).encode()).hexdigest()
