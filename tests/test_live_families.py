"""A run on families that are not plain decoders: it trains, its answers in a batch are those alone, and what stays is said."""

from dataclasses import replace

import pytest
import torch
from tiny import TOY, digest, said

from peftlab import RunSpec, SpecError, adapters, caches, fused, resolve, seam
from peftlab.base import weights
from peftlab.bench import families
from peftlab.data import tasks
from peftlab.run.engine import train
from peftlab.run.generate import Decoding, Reader, Replayed, pads

KINDS = {
    "bloom": "alibi, no position ids, eager alone",
    "gemma2": "soft caps, eager alone",
    "falcon": "attention that it does not look up by name",
    "phimoe": "a router derived from a linear map that gives more than a tensor",
    "gpt_neox": "a quarter of each head is rotated",
    "gemma3n_text": "a rotation of one at a time, layers that share a cache, a product changed in place",
    "lfm2": "convolutions between attention",
    "mamba": "a state alone",
    "rwkv": "a state of its own, and no cache",
    "deepseek_v4": "blocks of tokens summed up",
    "afmoe": "attention that is given its mask by name",
}
PROMPTS = [[5, 9, 200, 31], [7], [42, 43, 44, 45, 46, 47, 48, 300, 301], [9] * 10 + [3], [9] * 10 + [4, 8, 8]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = str(families.save(kind, tmp_path_factory.mktemp(kind) / kind))
        return made[kind]

    return of


def base_of(folder, **settings):
    return weights.load(resolve(RunSpec(model=folder, precision="fp32", **settings)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_answers_in_a_batch_as_alone(kind, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "toy", replace(TOY, max_new_tokens=2))
    spec = resolve(RunSpec(model=saved(kind), task="toy", steps=2, precision="fp32", learning_rate=1e-2))
    before = digest(base_of(saved(kind)).model)
    *_, done = train(spec, tmp_path)
    assert done["steps"] == 2 and done["forgetting"] == pytest.approx(done["forgetting"])
    base = base_of(saved(kind))
    model = adapters.apply(base, adapters.read(tmp_path / "adapter"))
    together = said(model, PROMPTS, Decoding(4), -1)
    assert together == [said(model, [prompt], Decoding(4), -1)[0] for prompt in PROMPTS]
    plain = adapters._applied(base, adapters.read(tmp_path / "adapter"))
    ids = torch.tensor([PROMPTS[-1]], device=base.model.device)
    with torch.no_grad():
        assert seam.logits(model, input_ids=ids).allclose(seam.logits(plain, input_ids=ids), atol=1e-4)
    assert digest(base.model) == before


def test_only_a_cache_of_single_tokens_is_shared_and_fixed(saved):
    for kind, plain in (("gpt_neox", True), ("lfm2", False), ("mamba", False), ("bloom", False)):
        model = base_of(saved(kind)).model
        assert caches.reads_by_attention(model) == plain
        with torch.inference_mode():
            reader = Reader(model, [[9] * 12 + [3], [9] * 12 + [4, 8]], 0)
            assert reader.mask.shape[1] - reader.ids.shape[1] == (12 if plain else 0)
            reader.feed(reader.logits().argmax(-1))
            assert isinstance(Replayed.of(reader, 2), Replayed if plain else type(None))


def test_what_padding_would_change_is_read_apart(saved):
    assert [kind for kind in ("gpt_neox", "bloom", "deepseek_v4") if pads(base_of(saved(kind)).model)] == [
        "gpt_neox",
        "bloom",
    ]


def test_what_does_not_fit_is_found_before_the_run_and_said(saved, monkeypatch):
    """A kind of fused operations that is wrong is left out, and the others are taken."""
    base = base_of(saved("gpt_neox"))

    def doubled(self, x):
        return 2 * torch.nn.functional.linear(x, self.weight)

    def spoiled(model):
        fused.maps.give_forward(model.get_output_embeddings(), doubled)
        return {"norms": 9}, []

    monkeypatch.setitem(fused.KINDS, "norms and rotary positions", spoiled)
    monkeypatch.setattr(fused.trial, "_found", {})
    taken = fused.quicken(copy := weights.share(base.model))
    assert taken.norms == 0 and taken.attention == 1
    assert "norms and rotary positions (tried, they gave other logits)" in taken.kept
    assert isinstance(copy.get_output_embeddings(), fused.Head), "it was put back as it was"


def test_a_model_that_sees_what_it_is_to_write_is_refused(saved):
    with pytest.raises(SpecError, match="reads the tokens after each token too"):
        base_of(saved("cpmant"))


def test_an_sdpa_that_a_family_lacks_is_refused_in_words(saved):
    with pytest.raises(SpecError, match="attention=sdpa: this model's family has no sdpa .*eager"):
        base_of(saved("gemma2"), attention="sdpa")
