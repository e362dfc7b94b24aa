"""How long a step takes on a GPU: a roofline for each operation that the trace has seen, and what launching them takes.

An operation takes as long as its products at a share of the GPU's peak, or its bytes at a share of its bandwidth, whichever is
longer (Williams et al. 2009, doi 10.1145/1498765.1498785), and a little for being begun. Launched one after the other, a step
takes as long as the GPU computes or as Python needs to launch, whichever is longer; replayed as a CUDA graph, only the first.
The constants are fitted to recorded steps by `bench seconds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from .. import catalog
from ..catalog.gpus import GPU, GPUS
from ..spec import Resolved


class Operation(NamedTuple):
    """One kind of operation, of which a step has many alike."""

    phase: str
    """forward, backward or optimizer."""
    kind: str
    """`product`, `attention`, `elements` of tensors, `tensor` (one of those that an optimizer updates together), `library` (a
    kernel that bitsandbytes launches), or what runs nothing on the GPU: a `view`, or the call of a `module`."""
    bits: int
    """Of a number that is multiplied; 0 where none is."""
    flops: int
    moved: int
    """Bytes that are read or written."""
    driven: bool
    """Whether Python calls for it; autograd calls for the others, which is faster."""
    recorded: bool = False
    """Whether autograd makes a note of it for the backward pass, which Python waits for."""


Step = Mapping[Operation, int]
"""How often a step has each operation."""
EAGER, GRAPH = "eager", "graph"
"""The gears of a step: its operations launched one after the other, or replayed as one CUDA graph."""
BOTH = 6
"""The exponent with which computing and launching are joined: near the longer of the two, above it where they are alike."""


@dataclass(frozen=True)
class Constants:
    """What is fitted. Shares are of the data sheet's figure, times in seconds."""

    products: float
    """Share of the peak that products of 16-bit numbers reach."""
    exact_products: float
    """The same for 32-bit numbers."""
    attention: float
    """The same for attention."""
    memory: float
    """Share of the bandwidth."""
    product: float
    """To begin a product of 16-bit numbers, on the GPU."""
    exact_product: float
    """To begin one of 32-bit numbers: most are an adapter's, thin."""
    elements: float
    """To begin any other operation."""
    tensor: float
    """For each tensor that an optimizer updates together with others."""
    called: float
    """To launch an operation that Python calls for."""
    derived: float
    """To launch one that autograd calls for."""
    viewed: float
    """For a view that Python calls for."""
    derived_view: float
    """For one that autograd calls for."""
    recorded: float
    """More for an operation or a view that autograd makes a note of."""
    library: float
    """To launch a kernel of bitsandbytes, whose Python does more."""
    module: float
    """To call a module."""


def busy(operations: Step, gpu: GPU, constants: Constants) -> float:
    """Seconds in which the GPU computes."""
    return sum(n * _busy(operation, gpu, constants) for operation, n in operations.items())


def _busy(operation: Operation, gpu: GPU, c: Constants) -> float:
    if operation.kind in ("view", "module"):
        return 0.0
    peak = (gpu.bf16_tflops or 0) if operation.bits == 16 else gpu.fp32_tflops
    share = c.attention if operation.kind == "attention" else c.products if operation.bits == 16 else c.exact_products
    computing = operation.flops / (peak * 1e12 * share) if operation.flops else 0.0
    moving = operation.moved / (gpu.bandwidth_gb_s * 1e9 * c.memory)
    begun = c.tensor if operation.kind == "tensor" else c.elements
    if operation.flops:
        begun = c.product if operation.bits == 16 else c.exact_product
    return max(computing, moving) + begun


def launching(operations: Step, constants: Constants, *phases: str) -> float:
    """Seconds that Python and autograd need to launch them one after the other: all, or those of these phases."""
    return sum(n * _launching(o, constants) for o, n in operations.items() if not phases or o.phase in phases)


def _launching(operation: Operation, c: Constants) -> float:
    if operation.kind == "tensor":
        return 0.0  # few launches for all of them
    if operation.kind == "library":
        return c.library
    if operation.kind == "module":
        return c.module
    more = c.recorded if operation.recorded else 0.0
    if operation.kind == "view":
        return more + (c.viewed if operation.driven else c.derived_view)
    return more + (c.called if operation.driven else c.derived)


def joined(computing: float, launching: float) -> float:
    """Seconds of a step whose operations are launched one after the other, while those before them compute."""
    return (computing**BOTH + launching**BOTH) ** (1 / BOTH)


def of_step(operations: Step, gpu: GPU, gear: str, constants: Constants) -> float:
    """Seconds of a step in a gear, `eager` or `graph`."""
    computing = busy(operations, gpu, constants)
    return computing if gear == GRAPH else joined(computing, launching(operations, constants))


@dataclass(frozen=True)
class Fitted:
    """The constants that `bench seconds` found, and how far off they were, each family being predicted from the others."""

    constants: Constants
    hardware: tuple[str, ...]
    """The machines that the steps were recorded on."""
    steps: int
    mean: float
    """The mean absolute error, as a share."""
    worst: float
    elsewhere: float | None
    """How many times as long an eager step took on other hosts with the same GPU, in the median, where that was recorded."""


@cache
def fitted() -> Fitted:
    found = catalog.read("seconds")
    constants, hardware = Constants(**found["constants"]), tuple(found["hardware"])
    errors = found["mean"], found["worst"]
    return Fitted(constants, hardware, len(found["rows"]), *errors, found["elsewhere"].get("median"))


def predicted(spec: Resolved, operations: Step, gear: str = EAGER) -> float | None:
    """Seconds of a run's step on its GPU, what passes between several left out.

    None where it has no GPU, or one that the step's numbers are not made for, and where states are offloaded.
    """
    gpu = GPUS.get(spec.gpu)
    if gpu is None or spec.offload != "none":
        return None
    if gpu.bf16_tflops is None and any(operation.bits == 16 for operation in operations):
        return None
    return of_step(operations, gpu, gear, fitted().constants)
