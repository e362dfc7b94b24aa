"""Every method at its own defaults learns with the real weights: slow, so CI takes four of them for a few steps."""

import os
from statistics import mean

import pytest
from tiny import run_of, steps

from peftlab import RunSpec, resolve
from peftlab.methods import METHODS

pytestmark = pytest.mark.real
NEEDED = {"bitfit": {"train_norms": True}}
"""SmolLM2 has no biases, so BitFit as its paper has it refuses."""


@pytest.fixture(autouse=True)
def every_core():
    """The other tests use one, so that tiny models do not wait for threads."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def losses(method, n, out):
    spec = resolve(RunSpec(method=method, task="ticket", batch_size=4, steps=n, **NEEDED.get(method, {})))
    return steps(run_of(spec, out), n)


@pytest.mark.slow_real
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_in_20_steps(method, tmp_path):
    seen = losses(method, 20, tmp_path)
    assert mean(seen[-5:]) < 0.9 * mean(seen[:2]), seen


@pytest.mark.parametrize("method", ["prompt", "houlsby", "ia3", "vera"])
def test_it_begins_to_learn(method, tmp_path):
    seen = losses(method, 8, tmp_path)
    assert seen[-1] < seen[0], seen
