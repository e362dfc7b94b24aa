"""One training step of the size that a spec asks for, the same when it is traced and when it is measured.

Every token is predicted, as in pre-training and in most trainers. Importing this imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..spec import RunSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "amp": torch.float32}
OPTIMIZERS = ("adamw", "sgd", "sgd-momentum")


def optimizer(parameters: list[Any], spec: RunSpec) -> Any:
    """As the training engine makes it on CUDA, where torch updates all parameters together."""
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9 if spec.optimizer == "sgd-momentum" else 0.0, foreach=True)


def prepare(model: Any, spec: RunSpec) -> Any:
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def run(model: Any, optimizer: Any, spec: RunSpec, device: str) -> Iterator[str]:
    """Yields the name of each phase when it is over: forward, backward, optimizer."""
    for _ in range(spec.accumulation or 1):
        ids = torch.zeros(spec.batch_size or 1, spec.sequence_length or 1, dtype=torch.long, device=device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=spec.precision == "amp"):
            logits = model(input_ids=ids, use_cache=False).logits
        held = logits if spec.hold_outputs else None
        logits = logits[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        del logits
        yield "forward"
        loss.backward()
        del held, loss
        yield "backward"
    optimizer.step()
    yield "optimizer"
    optimizer.zero_grad(set_to_none=True)
