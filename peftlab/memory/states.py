"""Lines of what does not depend on the batch: weights, gradients, optimizer states and cuBLAS's workspace."""

from __future__ import annotations

import math

from .. import optimizers
from ..spec import Resolved
from . import case as cases
from .case import Case
from .conventions import NF4_BITS
from .lines import Line, Size, Sum, line

FORWARD, PASS, LOSS, HEAD, LAST, RECOMPUTE, FIRST, EMBEDDING, OPTIMIZER = MOMENTS = (
    "forward", "forward in a layer", "backward at the loss", "backward at the head", "backward in the last layer",
    "backward recomputing a layer", "backward in the first layer", "backward at the embedding", "optimizer",
)  # fmt: skip
"""Where a step can be at its highest. Layers in between lie between the last and the first."""
MIB = 2**20
WORKSPACE = {"h100": 32 * MIB, "h200": 32 * MIB, "": 8320 * 1024}
"""What cuBLAS keeps from its first product in each thread on. Hopper's is measured (assets/measured/memory-h100.json); the
others' is PyTorch's default."""
LT_WORKSPACE = MIB
"""cuBLASLt's, which adds a bias."""


def workspace(gpu: str | None) -> int:
    """Bytes for one thread."""
    return WORKSPACE.get((gpu or "").split("-")[0], WORKSPACE[""])


def lines(case: Case) -> list[Line]:
    return [*_weights(case), *_gradients(case), *_optimizer(case), *_workspace(case)]


def _weights(case: Case) -> list[Line]:
    spec, shape = case.spec, case.shape
    borrowed = 0
    if case.method.in_place:
        borrowed = sum(case.method.trained(t.module, spec) * t.count for t in case.targets if not t.module.tied)
    frozen = shape.total_parameters - borrowed
    packed = min(frozen, sum(m.weight * m.count for m in shape.linear())) if case.quantized else 0
    bits = NF4_BITS[spec.double_quantization] if spec.quantization == "nf4" else 8
    sizes = {
        **case.sizes,
        "N_frozen": Size(frozen - packed),
        "N_packed": Size(packed),
        "N": Size(case.trained, f"N ({_at(case):,})" if _depends_on_rank(case) else f"{_at(case):,}"),
        "d_max": Size(max((t.module.d_in if t.module.is_linear else 0 for t in case.targets), default=0)),
        "d'_max": Size(max((t.module.d_out if t.module.is_linear else 0 for t in case.targets), default=0)),
    }
    once = {
        " ".join({"rank": "r", "d_in": "d_max", "d_out": "d'_max"}[f] for f in k.factors): case.adapter * k.coefficient
        for k in case.kept("model")
    }
    return [
        *line(
            sizes, "frozen weights", "frozen_weights", "", {"N_frozen": case.wide, "N_packed": bits / 8}, MOMENTS,
            f"{spec.quantization} packs the linear maps; embeddings, norms and the head stay as they are" if packed else "",
        ),
        *line(sizes, "trained weights", "trainable_weights", "", {"N": case.adapter}, MOMENTS),
        *line(sizes, "matrices that all modules share", "frozen_weights", "", once, MOMENTS, "fixed, as the seed made them"),
    ]  # fmt: skip


def _depends_on_rank(case: Case) -> bool:
    return any(powers[2] for powers, x in case.trained.terms.items() if x)


def _at(case: Case) -> int:
    return round(case.trained.value(1, 1, case.spec.rank))


def _gradients(case: Case) -> list[Line]:
    """Those of the head and a tied embedding are summed before they are added to the last pass's."""
    head = case.head if case.head and case.trains(case.head) else None
    embedding = case.embedding if case.embedding and case.trains(case.embedding) else None
    held = case.spec.accumulation > 1
    tied = head is not None and head.tied and embedding is not None
    last = embedding.weight if embedding and not tied else 0
    sizes = {
        **case.sizes,
        "N": Size(case.trained, f"{_at(case):,}"),
        "N_above": Size(case.trained + -last, f"{_at(case) - last:,}"),
    }
    e = case.adapter

    def gradients(name: str, parts: Sum, moments: tuple[str, ...], note: str = "") -> list[Line]:
        return line(sizes, name, "gradients", "", parts, moments, note)

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
    kind, each = optimizers.find(case.spec), case.adapter
    name = case.spec.optimizer
    sizes = {**case.sizes, "N": Size(case.trained, f"{_at(case):,}")}
    if name == "adafactor":
        sizes["N_rc"] = Size(sum(n * _rows_and_columns(shape) for n, shape in case.tensors))
        sizes["N_max"] = Size(max(math.prod(shape) for _, shape in case.tensors))
        found = line(sizes, "optimizer states", "optimizer", "", {"N_rc": each}, MOMENTS, "a row and a column a matrix")
        note = "the update of the largest tensor"
        found += line(sizes, "optimizer's temporaries", "temporaries", "", {"N_max": each}, (OPTIMIZER,), note)
    elif kind.bits == 8:
        found = _blockwise(case, kind, sizes)
    else:
        bytes_each = kind.states * (4 if kind.bits == 32 else each)
        found = line(
            sizes, "optimizer states", "optimizer", "", {"N": bytes_each}, MOMENTS, f"{kind.states} a parameter"
        )
    if name == "adamw" and kind.library == "torch":
        note = "the roots of the second moments, of all tensors at once"
        found += line(sizes, "optimizer's temporaries", "temporaries", "", {"N": each}, (OPTIMIZER,), note)
    return found


def _rows_and_columns(shape: tuple[float, ...]) -> float:
    n = math.prod(shape)
    return n / shape[-1] + n / shape[-2] if len(shape) > 1 else n


def paged(spec: Resolved) -> int:
    """Bytes of optimizer states that live outside PyTorch's memory."""
    kind = optimizers.find(spec)
    large = sum(
        n * math.prod(shape) for n, shape in cases.case(spec).tensors if math.prod(shape) >= optimizers.SMALLEST_PAGED
    )
    return round(large * kind.states * (kind.bits or 0) / 8) if kind.paged else 0


def _blockwise(case: Case, kind: optimizers.Optimizer, sizes: dict[str, Size]) -> list[Line]:
    """bitsandbytes: a byte and a 256th of a scale a number, and fp32 for small tensors."""
    counted = [(n, math.prod(shape)) for n, shape in case.tensors]
    small = sum(n * size for n, size in counted if size < optimizers.SMALLEST_8BIT)
    paged = sum(n * size for n, size in counted if kind.paged and size >= optimizers.SMALLEST_PAGED)
    whole = not small and not paged
    sizes |= {
        "N_8": Size(case.trained, f"{_at(case):,}") if whole else Size(sum(n * s for n, s in counted) - small - paged)
    }
    sizes |= {"N_small": Size(small), "N_paged": Size(paged)}
    parts = {"N_8": kind.states * (1 + 4 / optimizers.BLOCK), "N_small": 4.0 * kind.states}
    parts["N_paged"] = kind.states * 4 / optimizers.BLOCK
    return line(sizes, "optimizer states", "optimizer", "", parts, MOMENTS, "8-bit blocks with a scale each")


def _workspace(case: Case) -> list[Line]:
    size = workspace(case.spec.gpu)
    biased = any("bias" in m.parameters for m in case.shape.linear()) or "bottleneck" in case.method.settings
    size += LT_WORKSPACE if biased else 0
    note = "for each of two threads: PyTorch runs the backward pass in one of its own"
    return line(case.sizes, "cuBLAS", "workspace", "", {"": 2 * size}, MOMENTS, note)
