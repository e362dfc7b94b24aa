"""A plain loop with torch.compile around the model, which compiles each width: every batch is as wide as the longest row."""

import math
from itertools import islice

from ...base import weights
from ...run.gears import CLIP
from ...run.model import attached
from ...spec import Json, Resolved
from . import Peer, _shared, register


def run(spec: Resolved) -> Json:
    import torch

    base = weights.load(spec)
    model = attached(base, spec).train()
    fast = torch.compile(model)
    optimizer, schedule = _shared.optimizer(model, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    stream = _shared.batches(base, spec, padding=math.inf)
    watch, tokens = _shared.Watch(), 0
    for batch in islice(stream, spec.steps):
        tokens += batch.tokens
        ids, labels = batch.data.to(base.device)
        logits = fast(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the step's end
        watch.step()
    return watch.finish(tokens) | {"score": _shared.score(model, base, spec)}


register(Peer("torch.compile", "torch", run, turn=3))
