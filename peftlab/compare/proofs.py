"""Claims about LoRA, proved by doing: merging changes nothing, the update is a dial, and merged it costs no time.

Each proof works on private copies of the base, which stays as it was, and takes every method that can be merged.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import adapters, compare, fused, hardware, methods
from ..adapters import Adapter
from ..base import architecture, weights
from ..data import tasks
from ..errors import SpecError
from ..resolve import resolve
from ..run.generate import Decoding, decode, stream
from ..spec import RunSpec

BASE, APART, MERGED, SERIAL = "base", "apart", "merged", "serial"
"""The four of `latency`: the base; the adapter beside its weights; in them; and a fresh Houlsby adapter between layers."""
ALL = (BASE, APART, MERGED, SERIAL)
SERIAL_METHOD = "houlsby"
STOPS = (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Flip:
    """A place where merging changes the likeliest next token."""

    position: int
    """Of the token just read, from 0, in prompt and answer together."""
    apart: str
    """The text of the token that W₀ and BA kept apart put first."""
    merged: str
    """The text of the one that the merged weights put first."""
    margin: float
    """By how much its logit leads the other's where they are kept apart; 0 is a tie. At least 0."""


@dataclass(frozen=True)
class Agreement:
    """Kept apart and merged, in one precision, at every position of the prompt and of the same answer."""

    precision: str
    """fp32 or bf16: of the weights and of the arithmetic."""
    largest_difference: float
    """Between two logits of the same position and token; at least 0."""
    positions: int
    """How many were compared: the tokens of prompt and answer."""
    flips: tuple[Flip, ...]
    """Where the likeliest token differs, in order."""
    apart_off: float
    """How far the logits kept apart are from those of fp32 kept apart, at most: what the precision itself costs."""
    merged_off: float
    """How far the merged ones are from the same: no farther means that merging adds nothing to that cost."""


@dataclass(frozen=True)
class MergeReport:
    prompt_tokens: int
    """Tokens of the prompt as the model reads it, with its instruction and template."""
    answer: str
    """What the adapter answers, kept apart, in fp32: the text that all models read."""
    adapter_moves: float
    """The largest difference that the adapter makes to a logit of the base, in fp32: what merging is to keep."""
    agreements: tuple[Agreement, ...]
    """In fp32, then in bf16."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_check(adapter: Adapter, prompt: str, max_new_tokens: int = 32) -> MergeReport:
    """The same prompt through W₀ + BA kept apart and merged, in fp32 and in bf16.

    The adapter answers once, greedily, with at most `max_new_tokens`; then all models read that same text. Takes memory
    for a few copies of the logits, tokens × vocabulary. A quantized run's adapter is put on the whole base. Raises SpecError
    for a method that cannot be merged and for a prompt that does not fit, AdapterError where the adapter does not.
    """
    import torch

    base, decoding = _whole(adapter, "fp32"), Decoding(max_new_tokens)
    pair = _pair(base, adapter)
    asked = _prompt_tokens(base, adapter, prompt, decoding)
    said = [t for (t,) in decode(pair[0], [asked], base.tokenizer.eos_token_id, decoding) if t is not None]
    ids = asked + said
    true = _logits(pair[0], ids)
    moves = _gap(true, _logits(base.model, ids))
    whole = _agreement("fp32", true, _logits(pair[1], ids), true, base.tokenizer)
    pair = _pair(replace(base, model=_rounded(base.model, torch.bfloat16)), adapter)
    rounded = _agreement("bf16", _logits(pair[0], ids), _logits(pair[1], ids), true, base.tokenizer)
    answer = base.tokenizer.decode(said, skip_special_tokens=True)
    return MergeReport(len(asked), answer, moves, (whole, rounded))


def _whole(adapter: Adapter, precision: str | None) -> weights.Base:
    """The adapter's base, not quantized, in `precision`; None for the one this machine takes."""
    return weights.load(resolve(adapter.spec.but(precision=precision, gpu=None, quantization="none")))


def _prompt_tokens(base: weights.Base, adapter: Adapter, prompt: str, decoding: Decoding) -> list[int]:
    task = tasks.TASKS.get(adapter.spec.task or "")
    return compare.prompt_tokens(base, task.instruction if task else "", prompt, decoding)


def _pair(base: weights.Base, adapter: Adapter) -> tuple[Any, Any]:
    """Kept apart, and merged."""
    merged = adapters.merge(base, adapter)  # first, since it refuses what cannot be merged
    return adapters.apply(base, adapter), merged


def _logits(model: Any, ids: Sequence[int]) -> Any:
    """fp32, tokens × vocabulary."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float()


def _gap(one: Any, other: Any) -> float:
    return (one - other).abs().max().item()


def _agreement(precision: str, apart: Any, merged: Any, true: Any, tokenizer: Any) -> Agreement:
    """Of matrices of logits, tokens × vocabulary; `true` are those of fp32 kept apart."""
    first, other = apart.argmax(-1), merged.argmax(-1)
    flips = tuple(
        Flip(
            position,
            tokenizer.decode([int(first[position])]),
            tokenizer.decode([int(other[position])]),
            (apart[position, first[position]] - apart[position, other[position]]).item(),
        )
        for position in (first != other).nonzero().flatten().tolist()
    )
    return Agreement(precision, _gap(apart, merged), len(apart), flips, _gap(apart, true), _gap(merged, true))


def _rounded(model: Any, dtype: Any) -> Any:
    """A private copy with its parameters in `dtype`. Buffers stay: rotary frequencies in bf16 would be another model."""
    copy = weights.share(model)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    return copy


def dial(
    adapter: Adapter, prompt: str, stops: Sequence[float] = STOPS, max_new_tokens: int = 64
) -> Iterator[tuple[float, str]]:
    """(λ, what W₀ + λ·ΔW answers greedily) for each of `stops`, as each is done; ΔW is what merging adds to W₀.

    0 is the base and 1 the adapter, exactly; any finite number will do. In fp32, where merging does not round. Raises what
    `merge_check` does.
    """
    for stop in stops:
        if not math.isfinite(stop):
            raise SpecError(f"stop={stop}: the update is scaled by a finite number; try one from 0 to 2")
    base = _whole(adapter, "fp32")
    decoding = Decoding(max_new_tokens)
    ids = _prompt_tokens(base, adapter, prompt, decoding)
    merged = adapters.merge(base, adapter)
    for stop in stops:
        *_, (text,) = [""], *stream(_between(base.model, merged, stop), base.tokenizer, ids, decoding)
        yield stop, text


def _between(base: Any, merged: Any, stop: float) -> Any:
    """A copy of `merged` with W₀ + stop·(W − W₀) where its W is another than the base's W₀."""
    model = weights.share(merged)
    start, end = (dict(m.named_parameters(remove_duplicate=False)) for m in (base, merged))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if end[name].data_ptr() != start[name].data_ptr():
            parameter.data = start[name].detach().lerp(end[name].detach(), stop)  # exact at 0 and at 1
    return model


@dataclass(frozen=True)
class Speed:
    """How fast one of the four decodes, one token at a time, at batch 1."""

    what: str
    """base, apart, merged or serial."""
    seconds: float
    """A token: the median of the rounds."""
    lower: float
    """The first quartile of the rounds, in seconds a token."""
    upper: float
    """The third quartile."""
    ratio: float
    """This median over the base's; 1 is no cost."""
    added_modules: int
    """Modules in its tree beyond the base's; 0 where nothing but the numbers is new."""
    added_parameters: int
    """Parameters beyond the base's."""


@dataclass(frozen=True)
class LatencyReport:
    """Measured, not predicted: it holds for this machine and this moment."""

    model: str
    """Catalogue key of the base."""
    device: str
    """The name of what it ran on."""
    versions: dict[str, str]
    """Of the libraries it depends on."""
    precision: str
    """Of the weights: bf16 or fp32."""
    prompt_tokens: int
    """In the cache before the first token that is timed."""
    tokens: int
    """Timed in a round, for each model."""
    rounds: int
    """Counted, after one that is not."""
    speeds: tuple[Speed, ...]
    """The base, the adapter apart and merged, and the serial one."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def latency(
    adapter: Adapter, prompt: str, tokens: int = 16, rounds: int = 5, what: Sequence[str] = ALL
) -> Generator[float, None, LatencyReport]:
    """Seconds a token at batch 1, here and now. Yields the share done, from 0 to 1; returns the report.

    All decode as many tokens from the same prompt, one model after the other in each round, so that whatever else the
    machine does falls on all alike. Reading the prompt is not timed. Raises what `merge_check` does.
    """
    if rounds < 2:
        raise SpecError(f"rounds={rounds}: quartiles take at least 2; try 5")
    if tokens < 1:
        raise SpecError(f"tokens={tokens}: there must be at least 1 to time; try 16")
    base = _whole(adapter, None)
    decoding = Decoding(tokens + 1)  # the first comes out of the prompt
    ids = _prompt_tokens(base, adapter, prompt, decoding)
    models = contenders(base, adapter, what)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for place, (name, model) in enumerate(models.items()):
            yield (number + place / len(models)) / (rounds + 1)
            spent = _seconds_a_token(model, ids, decoding)
            if number:  # round 0 warms up
                seconds[name].append(spent)
    yield 1.0
    precision = "bf16" if _is_bf16(base) else "fp32"
    device, versions = hardware.here().name, hardware.versions()
    speeds = tuple(_speed(name, model, base.model, seconds) for name, model in models.items())
    return LatencyReport(base.entry.key, device, versions, precision, len(ids), tokens, rounds, speeds)


def contenders(base: weights.Base, adapter: Adapter, what: Sequence[str] = ALL) -> dict[str, Any]:
    """The models of `latency` by name, ready to generate, on copies of one base, their operations fused alike.

    The serial adapter is untrained: it starts as the identity, which takes it as long as anything else would.
    """
    make = {
        BASE: lambda: base.quick,
        MERGED: lambda: _fused(adapters.merge(base, adapter)),  # first, since it refuses what cannot be merged
        APART: lambda: adapters.apply(base, adapter),
        SERIAL: lambda: _fused(_serial(base, adapter)),
    }
    made = {name: make[name]() for name in make if name in what}
    return {name: made[name] for name in what}


def _serial(base: weights.Base, adapter: Adapter) -> Any:
    precision = "bf16" if _is_bf16(base) else "fp32"
    spec = resolve(RunSpec(model=adapter.spec.model, method=SERIAL_METHOD, adapter_precision=precision))
    targets = methods.targets(architecture.of(spec.model), spec, base.entry.name)
    return methods.find(SERIAL_METHOD).attach(weights.share(base.model), targets, spec).requires_grad_(False).eval()


def _fused(model: Any) -> Any:
    """As the base's and the adapter's own copies are."""
    fused.quicken(model)
    return model


def _is_bf16(base: weights.Base) -> bool:
    return str(base.model.dtype) == "torch.bfloat16"


def _seconds_a_token(model: Any, ids: list[int], decoding: Decoding) -> float:
    """Of all tokens but the first, which waits for the prompt. No token is −1, so none ends the answer early."""
    steps = decode(model, [ids], -1, decoding)
    next(steps)
    begun = time.perf_counter()
    count = sum(1 for _ in steps)  # each token is read back, so that a GPU has finished it
    return (time.perf_counter() - begun) / count


def _speed(name: str, model: Any, base: Any, seconds: dict[str, list[float]]) -> Speed:
    lower, median, upper = statistics.quantiles(seconds[name], method="inclusive")
    modules, parameters = (
        sum(1 for _ in model.modules()) - sum(1 for _ in base.modules()),
        sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters()),
    )
    return Speed(name, median, lower, upper, median / statistics.median(seconds[BASE]), modules, parameters)
