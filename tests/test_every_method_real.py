"""Every method at its own defaults learns with the real weights: slow, so CI takes one of them for a few steps."""

from statistics import mean

import pytest
from tiny import run_of, steps

from peftlab import RunSpec, resolve
from peftlab.methods import METHODS

pytestmark = pytest.mark.real
NEEDED = {"bitfit": {"train_norms": True}}
"""SmolLM2 has no biases, so BitFit as its paper has it refuses."""


def losses(method, n, out, task="ticket"):
    spec = resolve(RunSpec(method=method, task=task, batch_size=4, steps=n, **NEEDED.get(method, {})))
    return steps(run_of(spec, out), n)


@pytest.mark.slow_real
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_in_20_steps(method, tmp_path):
    seen = losses(method, 20, tmp_path)
    assert mean(seen[-5:]) < 0.9 * mean(seen[:2]), seen


def test_it_begins_to_learn(tmp_path):
    seen = losses("houlsby", 8, tmp_path, "intent")  # whose answers take the least time
    assert seen[-1] < seen[0], seen
