"""Base and adapted model side by side, what an adapter did to the weights, and proofs of what is said of LoRA."""

from typing import TYPE_CHECKING

from ..lazily import exported
from .reports import APART, BASE, MERGED, SERIAL, ComparisonReport, Exchange, Reply, Score, recorded, score_of, wilson

if TYPE_CHECKING:
    from .asking import instruction_of, models_of, notes_on, on_prompt, on_task, prompt_tokens, side_by_side

ASKING = ("instruction_of", "models_of", "notes_on", "on_prompt", "on_task", "prompt_tokens", "side_by_side")
__all__ = [
    "APART", "BASE", "MERGED", "SERIAL", "ComparisonReport", "Exchange", "Reply", "Score", "instruction_of", "models_of",
    "notes_on", "on_prompt", "on_task", "prompt_tokens", "recorded", "score_of", "side_by_side", "wilson",
]  # fmt: skip
__getattr__ = exported(__name__, dict.fromkeys(ASKING, "asking"))
