"""Base and adapted model side by side, what an adapter did to the weights, and proofs of what is said of LoRA."""

from .answers import (
    BASE,
    ComparisonReport,
    Exchange,
    Reply,
    Score,
    instruction_of,
    models_of,
    on_prompt,
    on_task,
    prompt_tokens,
    recorded,
    score_of,
    side_by_side,
    wilson,
)

__all__ = [
    "BASE", "ComparisonReport", "Exchange", "Reply", "Score", "instruction_of", "models_of", "on_prompt", "on_task",
    "prompt_tokens", "recorded", "score_of", "side_by_side", "wilson",
]  # fmt: skip
