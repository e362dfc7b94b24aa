"""What the page costs its server: processor time of its answers, and the size of what a browser loads first.

`python demos/page/measure.py`, which `peftlab bench page` runs, prints one JSON document. Each answer is to settings that
nobody asked for before.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import app
from peftlab.base.models import MODELS
from peftlab.methods import METHODS

ROUNDS = 200


def settings(draw: random.Random) -> dict[str, str]:
    """Settings of a run, as somebody who tries things out would choose them."""
    return {
        "model": draw.choice([key for key, model in MODELS.items() if model.is_causal]),
        "method": draw.choice([key for key in METHODS if "rank" in METHODS[key].settings]),
        "rank": str(draw.randint(1, 128)),
        "batch_size": str(draw.randint(1, 32)),
        "sequence_length": str(16 * draw.randint(1, 256)),
    }


def milliseconds(tab: str, states: list[dict[str, str]]) -> dict[str, float]:
    """Processor time of an answer, of what is in sight when the folds are closed."""
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
    for tab in tabs:  # what is made once is made before
        app.demo.store.answer({"number": 0, "tab": tab, "state": {"rank": "3"}, "open": []})
    answers: dict[str, Any] = {tab: milliseconds(tab, states) for tab in tabs}
    config = json.dumps(app.demo.get_config_file(), default=str, separators=(",", ":")).encode()
    print(
        json.dumps(
            {
                "answers_milliseconds": answers,
                "random_settings": ROUNDS,
                "config_bytes": len(config),
                "config_gzip_bytes": len(gzip.compress(config)),
            }
        )
    )


if __name__ == "__main__":
    main()
