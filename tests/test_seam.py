"""What is taken from transformers' insides is there, on the release that is installed."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import CONFIGS, ROOT, fresh

from peftlab import caches, seam

IDS = torch.tensor([[5, 6, 7, 8]])


def test_positions_are_rotated_by_whoever_the_sines_name_and_as_before_without():
    model = fresh("llama").eval()
    assert seam.writer(torch.nn.Sequential(model)) is model and seam.writer(torch.nn.Linear(2, 2)) is None
    kind = type(model.model.layers[0].self_attn)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    assert seam.offer_rotation(kind) and seam.offer_rotation(kind)
    assert not seam.offer_rotation(type(fresh("gpt2").transformer.h[0].attn))
    with torch.no_grad():
        assert model(input_ids=IDS).logits.equal(before)
    asked = []

    def unturned(q, k, cos, sin, *_, **__):
        asked.append(sin.shape)
        return q, k

    def marked(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        sin = sin.detach()
        setattr(sin, seam.TURN, unturned)
        return args, kwargs | {"position_embeddings": (cos, sin)}

    model.model.layers[0].self_attn.register_forward_pre_hook(marked, with_kwargs=True)
    with torch.no_grad():
        assert not model(input_ids=IDS).logits.equal(before) and len(asked) == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_what_was_read_is_kept_and_gone_on_from(family):
    model = fresh(family).eval()
    assert seam.rotary_sizes(model) == {"gemma3": {32}, "gpt2": set(), "opt": set()}.get(family, {16})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        _, held = seam.read(model, None, input_ids=IDS[:, :3])
        logits, held = seam.read(model, held, input_ids=IDS[:, 3:])
        assert logits[0, -1].allclose(model(input_ids=IDS).logits[0, -1], atol=1e-5)
    assert held.get_seq_length() == 4
    fixed = caches.fixed_cache(held, 9, torch.zeros((), dtype=torch.long))
    assert [layer.keys.shape[2] for layer in fixed.layers] == [9] * 3


def test_a_quiet_process_says_nothing_that_is_not_its_own():
    told = "import warnings, logging; warnings.warn('a'); logging.getLogger('b').warning('b')"
    talk = [sys.executable, "-c", told]
    loud = subprocess.run(talk, cwd=ROOT, capture_output=True, text=True)
    assert len(loud.stderr.splitlines()) > 1
    talk[-1] = f"from peftlab import seam; seam.quiet(); {told}"
    assert subprocess.run(talk, cwd=ROOT, capture_output=True, text=True).stderr == ""
    asked = os.environ | {"PYTHONWARNINGS": "always"}
    assert "UserWarning: a" in subprocess.run(talk, cwd=ROOT, capture_output=True, text=True, env=asked).stderr
