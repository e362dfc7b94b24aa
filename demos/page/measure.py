"""Measures what the page costs its server: processor time of its answers, and the size of what a browser loads first.

`peftlab bench page` runs this file, which prints one JSON document. No two answers are to the same settings.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import app
from peftlab.base.models import MODELS
from peftlab.methods import METHODS

ROUNDS = 200


def settings(draw: random.Random) -> dict[str, str]:
    """Settings of a run as a visitor might choose them."""
    return {
        "model": draw.choice([key for key, model in MODELS.items() if model.is_causal]),
        "method": draw.choice([key for key in METHODS if "rank" in METHODS[key].settings]),
        "rank": str(draw.randint(1, 128)),
        "batch_size": str(draw.randint(1, 32)),
        "sequence_length": str(16 * draw.randint(1, 256)),
    }


def milliseconds(tab: str, states: list[dict[str, str]]) -> dict[str, float]:
    """Processor time of an answer while the folds are closed."""
    took = []
    for number, state in enumerate(states):
        start = time.process_time()
        app.demo.store.answer({"number": number, "tab": tab, "state": state, "open": []})
        took.append(1000 * (time.process_time() - start))
    return {"median": statistics.median(took), "p95": statistics.quantiles(took, n=20)[-1], "most": max(took)}


def main() -> None:
    draw = random.Random(0)
    states = [settings(draw) for _ in range(ROUNDS)]
    tabs = list(app.demo.store.tabs)
    for tab in tabs:  # makes what is made only once
        app.demo.store.answer({"number": 0, "tab": tab, "state": {"rank": "3"}, "open": []})
    config = json.dumps(app.demo.get_config_file(), default=str, separators=(",", ":")).encode()
    found = {
        "answers_milliseconds": {tab: milliseconds(tab, states) for tab in tabs},
        "random_settings": ROUNDS,
        "config_bytes": len(config),
        "config_gzip_bytes": len(gzip.compress(config)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
