"""What is said of LoRA, proved on copies of a base: merging changes nothing, the update is a dial, merged it costs no time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters, fused, hardware, methods
from ..adapters import Adapter
from ..base import architecture, weights
from ..errors import SpecError
from ..resolve import resolve
from ..run.generate import Decoding, decode, stream
from ..spec import RunSpec
from .asking import instruction_of, prompt_tokens
from .reports import APART, BASE, MERGED, SERIAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL = (BASE, APART, MERGED, SERIAL)


@dataclass(frozen=True)
class Flip:
    """A place where merging changes the likeliest next token."""

    position: int
    """Position of the token just read, from 0, in prompt and answer together."""
    apart: str
    """The likeliest token where W₀ and BA are kept apart, as text."""
    merged: str
    margin: float
    """How far the logit of `apart` leads that of `merged` where W₀ and BA are kept apart, at least 0; 0 is a tie."""


@dataclass(frozen=True)
class Agreement:
    """Kept apart and merged, in one precision, at every position of the prompt and of the same answer."""

    precision: str
    """fp32 or bf16: the format of the weights and of the arithmetic."""
    largest_difference: float
    """The largest difference between the two models' logits of one token at one position."""
    positions: int
    """How many tokens prompt and answer have."""
    flips: tuple[Flip, ...]
    apart_off: float
    """The largest difference of the logits kept apart from those in fp32 kept apart: what the precision itself costs."""
    merged_off: float
    """The same of the merged model's logits. Where it is no larger, merging adds nothing to that cost."""


@dataclass(frozen=True)
class MergeReport:
    adapter_moves: float
    """The largest difference that the adapter makes to a logit of the base, in fp32: what merging is to keep."""
    agreements: tuple[Agreement, ...]
    """In fp32, then in bf16."""


def merge_check(adapter: Adapter, prompt: str, max_new_tokens: int = 32) -> MergeReport:
    """Sends one prompt through W₀ + BA kept apart and merged, in fp32 and in bf16.

    The adapter answers once, greedily, with at most `max_new_tokens`; then all models read that same text. It takes memory
    for a few copies of the logits, tokens × vocabulary. A quantized run's adapter is put on the whole base. Raises SpecError
    for a method that cannot be merged and for a prompt that does not fit, AdapterError where the adapter does not.
    """
    base, decoding = _whole(adapter, "fp32"), Decoding(max_new_tokens)
    merged, apart = adapters.merge(base, adapter), adapters.apply(base, adapter)
    asked = prompt_tokens(base, instruction_of(adapter), prompt, decoding)
    said = [t for (t,) in decode(apart, [asked], base.tokenizer.eos_token_id, decoding) if t is not None]
    ids = asked + said
    true = _logits(apart, ids)
    moves = _gap(true, _logits(base.model, ids))
    whole = _agreement("fp32", true, _logits(merged, ids), true, base.tokenizer)
    half = replace(base, model=_rounded(base.model))
    merged, apart = adapters.merge(half, adapter), adapters.apply(half, adapter)
    rounded = _agreement("bf16", _logits(apart, ids), _logits(merged, ids), true, base.tokenizer)
    return MergeReport(moves, (whole, rounded))


def _whole(adapter: Adapter, precision: str | None) -> weights.Base:
    """The adapter's base, not quantized, in `precision`; None for the one this machine takes."""
    return weights.load(resolve(adapter.spec.but(precision=precision, gpu=None, quantization="none")))


def _logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The logits in fp32, tokens × vocabulary."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float()


def _gap(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _agreement(
    precision: str, apart: Tensor, merged: Tensor, true: Tensor, tokenizer: PreTrainedTokenizerBase
) -> Agreement:
    """Compares logits, tokens × vocabulary; `true` are those of fp32 kept apart."""
    flips = []
    for position, (one, other) in enumerate(zip(apart.argmax(-1).tolist(), merged.argmax(-1).tolist(), strict=True)):
        if one != other:
            margin = (apart[position, one] - apart[position, other]).item()
            flips.append(Flip(position, str(tokenizer.decode([one])), str(tokenizer.decode([other])), margin))
    return Agreement(precision, _gap(apart, merged), len(apart), tuple(flips), _gap(apart, true), _gap(merged, true))


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A private copy with its parameters in bf16. Buffers stay: rotary frequencies in bf16 would be another model."""
    copy = weights.share(model)
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    return copy


def dial(
    adapter: Adapter, prompt: str, stops: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0), max_new_tokens: int = 64
) -> Iterator[tuple[float, str]]:
    """Yields λ and what W₀ + λ·ΔW answers greedily, for each λ of `stops`; ΔW is what merging adds to W₀.

    0 is the base and 1 the adapter, exactly; any finite number will do. The weights are in fp32, where merging does not
    round. Raises what `merge_check` does.
    """
    for stop in stops:
        if not math.isfinite(stop):
            raise SpecError(f"stop={stop}: the update is scaled by a finite number; try one from 0 to 2")
    base, decoding = _whole(adapter, "fp32"), Decoding(max_new_tokens)
    ids = prompt_tokens(base, instruction_of(adapter), prompt, decoding)
    merged = adapters.merge(base, adapter)
    for stop in stops:
        *_, (text,) = [""], *stream(_between(base.model, merged, stop), base.tokenizer, ids, decoding)
        yield stop, text


def _between(base: PreTrainedModel, merged: PreTrainedModel, stop: float) -> PreTrainedModel:
    """A copy of `merged` in which each W that differs from the base's W₀ becomes W₀ + stop·(W − W₀)."""
    model = weights.share(merged)
    start, end = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, merged))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if end[name].data_ptr() != start[name].data_ptr():
            parameter.data = start[name].detach().lerp(end[name].detach(), stop)  # exact at 0 and at 1
    return model


@dataclass(frozen=True)
class Speed:
    """How fast one of the four models decodes, one token at a time, at batch 1."""

    what: str
    """base, apart, merged or serial."""
    seconds: float
    """Seconds a token: the median of the rounds."""
    lower: float
    upper: float
    """The first and the third quartile, in seconds a token."""
    ratio: float
    """This median over the base's; 1 is no cost."""
    added_modules: int
    added_parameters: int
    """Modules and parameters that the base does not have; 0 where nothing but the numbers is new."""


@dataclass(frozen=True)
class LatencyReport:
    """What was measured on this machine and at this moment."""

    device: str
    versions: dict[str, str]
    precision: str
    """Number format of the weights: bf16 or fp32."""
    tokens: int
    """Tokens that each model is timed on in a round."""
    rounds: int
    """Rounds that count; one more comes before them, to warm up."""
    speeds: tuple[Speed, ...]
    """The base, the adapter apart and merged, and the serial one."""


def latency(
    adapter: Adapter, prompt: str, tokens: int = 16, rounds: int = 5, what: Sequence[str] = ALL
) -> Generator[float, None, LatencyReport]:
    """Measures seconds a token at batch 1, of the models that `what` names. Yields the share done; returns the report.

    All models decode as many tokens from the same prompt, one model after the other in each round, so that whatever else
    the machine does falls on all alike. Reading the prompt is not timed. Raises what `merge_check` does.
    """
    if rounds < 2:
        raise SpecError(f"rounds={rounds}: quartiles take at least 2; try 5")
    if tokens < 1:
        raise SpecError(f"tokens={tokens}: there must be at least 1 to time; try 16")
    base = _whole(adapter, None)
    decoding = Decoding(tokens + 1)  # the first comes out of the prompt
    ids = prompt_tokens(base, instruction_of(adapter), prompt, decoding)
    models = contenders(base, adapter, what)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for place, (name, model) in enumerate(models.items()):
            yield (number + place / len(models)) / (rounds + 1)
            steps = decode(model, [ids], -1, decoding)  # no token is −1, so that none ends the answer early
            next(steps)
            begun = time.perf_counter()
            count = sum(1 for _ in steps)  # each token is read back, so that a GPU has finished it
            if number:  # round 0 warms up
                seconds[name].append((time.perf_counter() - begun) / count)
    yield 1.0
    speeds = []
    for name, model in models.items():
        lower, median, upper = statistics.quantiles(seconds[name], method="inclusive")
        modules = len(list(model.modules())) - len(list(base.model.modules()))
        parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.model.parameters())
        speeds.append(Speed(name, median, lower, upper, median / statistics.median(seconds[BASE]), modules, parameters))
    return LatencyReport(hardware.here().name, hardware.versions(), _precision(base), tokens, rounds, tuple(speeds))


def contenders(base: weights.Base, adapter: Adapter, what: Sequence[str] = ALL) -> dict[str, PreTrainedModel]:
    """The models of `latency` by name, ready to generate, on copies of one base, their operations fused alike.

    The serial adapter is untrained: it starts as the identity, which takes it as long as anything else would.
    """
    make: dict[str, Callable[[], PreTrainedModel]] = {
        BASE: lambda: base.quick,
        MERGED: lambda: adapters.merge(base, adapter),
        APART: lambda: adapters.apply(base, adapter),
        SERIAL: lambda: _serial(base, adapter),
    }
    models = {name: make[name]() for name in what}
    for name in {MERGED, SERIAL} & models.keys():
        fused.quicken(models[name])
    return models


def _serial(base: weights.Base, adapter: Adapter) -> PreTrainedModel:
    spec = resolve(RunSpec(model=adapter.spec.model, method="houlsby", adapter_precision=_precision(base)))
    targets = methods.targets(architecture.of(spec.model), spec, base.entry.name)
    model = weights.share(base.model)
    methods.find(spec.method).attach(model, targets, spec)  # in its place, as bottleneck adapters are
    return model.requires_grad_(False).eval()


def _precision(base: weights.Base) -> str:
    return "bf16" if str(base.model.dtype) == "torch.bfloat16" else "fp32"
