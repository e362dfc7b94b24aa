"""Lines of what does not depend on the batch: weights, gradients, optimizer states and cuBLAS's workspace."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .. import optimizers
from ..base.architecture import Architecture
from ..count import count
from ..optimizers import Optimizer
from ..spec import Resolved
from .allocator import MIB
from .case import Case
from .lines import Line, Size, Sum

FORWARD, PASS, LOSS, HEAD, LAST, RECOMPUTE, FIRST, EMBEDDING, OPTIMIZER = MOMENTS = (
    "forward", "forward in a layer", "backward at the loss", "backward at the head", "backward in the last layer",
    "backward recomputing a layer", "backward in the first layer", "backward at the embedding", "optimizer",
)  # fmt: skip
"""Where a step can be at its highest. Layers in between lie between the last and the first."""
KEPT = (FORWARD, PASS, LOSS, HEAD, LAST)
"""Moments at which everything is there that all layers keep."""
ALWAYS = (*KEPT, RECOMPUTE, FIRST)
WORKSPACE = {"h100": 32 * MIB, "h200": 32 * MIB, "": 8320 * 1024}
"""Bytes that cuBLAS keeps in each thread from its first product on. Hopper's are measured
(assets/measured/memory-h100.json); the others' are PyTorch's default."""
LT_WORKSPACE = MIB
"""Bytes that cuBLASLt, which adds a bias, keeps likewise."""

NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits of a weight in NF4: 4, and an fp32 scale for each block of 64. With double quantization (True) the scale is 8 bits,
and 256 scales share one fp32. Source: QLoRA, arXiv 2305.14314 section 3."""


def quantizable(shape: Architecture) -> int:
    """Weights that quantization packs: those of linear maps. Embeddings, norms and the head stay as they are."""
    return sum(m.weight * m.count for m in shape.linear())


def quantized_bits(spec: Resolved) -> float:
    """Bits of a packed weight. int8's scales, one for each output, are left out."""
    return NF4_BITS[spec.double_quantization] if spec.quantization == "nf4" else 8


def of_family(gpu: str, known: Mapping[str, int]) -> int:
    """What is known of a GPU's family (`h100` for `h100-80gb`); the entry "" for the others and for no GPU."""
    return known.get(gpu.split("-")[0], known[""])


def workspace(gpu: str) -> int:
    """Bytes of cuBLAS's workspace in one thread."""
    return of_family(gpu, WORKSPACE)


def lines(case: Case, running: Case) -> list[Line]:
    """Everything in a step's memory that the batch does not change; only targets that are `running` get gradients."""
    biased = any("bias" in m.parameters for m in case.shape.linear()) or "bottleneck" in case.method.settings
    size = workspace(case.spec.gpu) + (LT_WORKSPACE if biased else 0)
    note = "for each of two threads: PyTorch runs the backward pass in one of its own"
    found = case.line("cuBLAS", "", {"": 2 * size}, MOMENTS, note, kind="workspace")
    return [*_weights(case), *_gradients(running), *_optimizer(running), *found]


def _weights(case: Case) -> list[Line]:
    spec = case.spec
    frozen = count(spec).frozen_parameters
    packed = min(frozen, quantizable(case.shape)) if spec.quantization != "none" else 0
    shown = f"N ({case.n_trained:,})" if any(p[2] for p, x in case.trained.terms.items() if x) else ""
    adapted = [t.module for t in case.targets if t.module.is_linear]
    sizes: dict[str, Size | float] = {
        "N_frozen": frozen - packed,
        "N_packed": packed,
        "N": Size(case.trained, shown or f"{case.n_trained:,}"),
        "d_max": max((m.d_in for m in adapted), default=0),
        "d'_max": max((m.d_out for m in adapted), default=0),
    }
    symbols = {"rank": "r", "d_in": "d_max", "d_out": "d'_max"}
    shared = {" ".join(symbols[f] for f in k.factors): case.trained_bytes * k.coefficient for k in case.kept("model")}

    packing = f"{spec.quantization} packs the linear maps; embeddings, norms and the head stay as they are"
    note, base = packing if packed else "", {"N_frozen": case.stream_bytes, "N_packed": quantized_bits(spec) / 8}
    trained, made = {"N": case.trained_bytes}, "fixed, as the seed made them"
    return [
        *case.line("frozen weights", "", base, MOMENTS, note, sizes, "frozen_weights"),
        *case.line("trained weights", "", trained, MOMENTS, "", sizes, "trainable_weights"),
        *case.line("matrices that all modules share", "", shared, MOMENTS, made, sizes, "frozen_weights"),
    ]


def _gradients(case: Case) -> list[Line]:
    """A head and an embedding tied to it share one gradient: their parts are summed, then added to that of earlier passes."""
    head = case.head if case.trains(case.head) else None
    embedding = case.embedding if case.trains(case.embedding) else None
    held = case.spec.accumulation > 1
    tied = head is not None and head.tied and embedding is not None
    last = embedding.weight if embedding and not tied else 0
    sizes = {"N_above": Size(case.trained + -last, f"{case.n_trained - last:,}")}
    e = case.trained_bytes

    def gradients(name: str, parts: Sum, moments: tuple[str, ...], note: str = "") -> list[Line]:
        return case.line(name, "", parts, moments, note, sizes, "gradients")

    if held:
        found = gradients("gradients", {"N": e}, MOMENTS, "held from one pass to the next")
    else:
        found = gradients("gradients", {"N": e}, (EMBEDDING, OPTIMIZER), "each as the backward pass leaves it")
        found += gradients("gradients so far", {"N_above": e}, (RECOMPUTE, FIRST), "all but the embedding's")
    if head:
        note = "a product in bf16, then cast" if case.amp else ""
        found += gradients("the head's gradient", {"V h_V": e + 2 * case.amp}, (HEAD,), note)
        if tied or not held:
            found += gradients("the head's gradient", {"V h_V": e}, (LAST, FIRST) if held else (LAST,))
    if embedding and (tied or held):
        note = "a dense one, and its sum with the head's" if tied else "before it is added to the last pass's"
        found += gradients("the embedding's gradient", {"V h_V": e * (2 * tied + held)}, (EMBEDDING,), note)
    return found


def _optimizer(case: Case) -> list[Line]:
    kind, each = optimizers.find(case.spec), case.trained_bytes
    temporary = "optimizer's temporaries", ""
    if case.spec.optimizer == "adafactor":  # arXiv 1804.04235: second moments as one row and one column of each matrix
        both = [n * (math.prod(s[:-1]) + math.prod(s[:-2]) * s[-1] if len(s) > 1 else s[0]) for n, s in case.tensors]
        sizes = {"N_rc": sum(both), "N_max": max(math.prod(shape) for _, shape in case.tensors)}
        note = "a row and a column a matrix"
        found = case.line("optimizer states", "", {"N_rc": each}, MOMENTS, note, sizes, "optimizer")
        note = "the update of the largest tensor"
        found += case.line(*temporary, {"N_max": each}, (OPTIMIZER,), note, sizes, "temporaries")
    elif kind.bits == 8:
        found = _blockwise(case, kind)
    else:
        parts, note = {"N": kind.states * (4 if kind.bits == 32 else each)}, f"{kind.states} a parameter"
        found = case.line("optimizer states", "", parts, MOMENTS, note, kind="optimizer")
    if case.spec.optimizer == "adamw" and kind.library == "torch":
        note = "the roots of the second moments, of all tensors at once"
        found += case.line(*temporary, {"N": each}, (OPTIMIZER,), note, kind="temporaries")
    return found


def _blockwise(case: Case, kind: Optimizer) -> list[Line]:
    """bitsandbytes keeps a byte and a 256th of a scale for each number, and fp32 for small tensors."""
    counted = [(n, math.prod(shape)) for n, shape in case.tensors]
    small = sum(n * size for n, size in counted if size < optimizers.SMALLEST_8BIT)
    paged = sum(n * size for n, size in counted if kind.paged and size >= optimizers.SMALLEST_PAGED)
    rest = sum(n * size for n, size in counted) - small - paged
    sizes = {"N_8": rest if small or paged else case.sizes["N"], "N_small": small, "N_paged": paged}
    scales = 4 / optimizers.BLOCK
    parts = {"N_8": kind.states * (1 + scales), "N_small": 4.0 * kind.states, "N_paged": kind.states * scales}
    return case.line("optimizer states", "", parts, MOMENTS, "8-bit blocks with a scale each", sizes, "optimizer")


def paged(spec: Resolved) -> int:
    """Bytes of optimizer states that live outside PyTorch's memory."""
    kind = optimizers.find(spec)
    sizes = [(n, math.prod(shape)) for n, shape in Case.of(spec).tensors] if kind.paged else []
    numbers = sum(n * size for n, size in sizes if size >= optimizers.SMALLEST_PAGED)
    return round(numbers * kind.states * (kind.bits or 0) / 8)
