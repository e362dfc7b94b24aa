"""Prints as JSON what the page costs its server, a processor's time, and a browser, bytes, for `peftlab bench page`."""

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


def milliseconds(tab: str, state: dict[str, str]) -> float:
    """Processor time of an answer while the folds are closed."""
    start = time.process_time()
    app.demo.store.answer({"number": 0, "tab": tab, "state": state, "open": []})
    return 1000 * (time.process_time() - start)


def main() -> None:
    draw, took = random.Random(0), {}
    states = [  # as visitors might choose them
        {
            "model": draw.choice([key for key, model in MODELS.items() if model.is_causal]),
            "method": draw.choice([key for key in METHODS if "rank" in METHODS[key].settings]),
            "rank": str(draw.randint(1, 128)),
            "batch_size": str(draw.randint(1, 32)),
            "sequence_length": str(16 * draw.randint(1, 256)),
        }
        for _ in range(ROUNDS)
    ]
    for tab in app.demo.store.tabs:
        milliseconds(tab, {"rank": "3"})  # makes what is made only once
    for tab in app.demo.store.tabs:
        times = [milliseconds(tab, state) for state in states]
        p95 = statistics.quantiles(times, n=20)[-1]
        took[tab] = {"median": statistics.median(times), "p95": p95, "most": max(times)}
    config = json.dumps(app.demo.get_config_file(), default=str, separators=(",", ":")).encode()
    size = {"config_bytes": len(config), "config_gzip_bytes": len(gzip.compress(config))}
    print(json.dumps({"answers_milliseconds": took, "random_settings": ROUNDS, **size}))


if __name__ == "__main__":
    main()
