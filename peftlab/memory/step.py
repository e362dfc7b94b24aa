"""One training step of the size that a spec asks for, the same when it is traced and when it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import noop_context_fn

from .. import fused, optimizers
from ..spec import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "amp": torch.float32}


def optimizer(parameters: list[torch.nn.Parameter], spec: Resolved, fused: bool = False) -> Optimizer:
    """The run's optimizer as any trainer has it; or `fused`, where it can be, as the engine has it in a CUDA graph."""
    kind = optimizers.find(spec)
    how = "fused" if fused and optimizers.capturable(spec) else "foreach" if kind.together else ""
    return kind.make(parameters, 1e-4, **{how: True} if how else {})


def materialize(model: torch.nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Puts `make(module's name, t)` in place of each parameter and buffer t, once for those that several modules share."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too, or another would be given its id
    for module_name, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = make(module_name, old)
                    wrap = held is module._parameters and new is not old
                    made[id(old)] = old, torch.nn.Parameter(new, old.requires_grad) if wrap else new
                held[name] = made[id(old)][1]


def prepare(
    adapted: torch.nn.Module, spec: Resolved, engine: bool = False, contexts: Callable[..., object] = noop_context_fn
) -> PreTrainedModel:
    """The model in training, with checkpointing, in these `contexts`, where the run has it.

    After virtual tokens it gives logits of these too, as peft's own forward does, unless it is for our `engine`.
    """
    model = cast("PreTrainedModel", adapted)  # peft's wrapper answers as the model inside it does
    if not engine:
        vars(model).pop("forward", None)
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
        )
        model.enable_input_require_grads()
    return model.train()


def micro(
    model: PreTrainedModel, spec: Resolved, device: str, logits: int | None = None, ids: Tensor | None = None
) -> Iterator[str]:
    """One forward and one backward pass, every token predicted or the last `logits`. Yields each one's name as it begins.

    The tokens are `ids`, or all the same one: a mixture then asks few of its experts.
    """
    head = fused.head(model)
    yield "forward"
    if ids is None:
        ids = torch.zeros(spec.batch_size, spec.sequence_length, dtype=torch.long, device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=spec.precision == "amp"):
        kept = {} if logits is None else {"logits_to_keep": logits}
        out = model(input_ids=ids, use_cache=False, **kept).logits
    held = out if spec.hold_outputs else None
    ids = torch.nn.functional.pad(ids, (max(0, out.shape[1] - ids.shape[1]), 0), value=-100)  # for virtual tokens
    labels = ids[:, 1 - out.shape[1] :]
    out = out[:, :-1]
    if head is None:
        out = out.float().flatten(0, 1)[None]  # a copy in any type, so that the logits themselves need not outlive this
    loss = fused.cross_entropy(out, labels, head)
    del out
    yield "backward"
    loss.backward()
    del held, loss
