"""Virtual tokens: the model steered by them computes what peft's own would, and decoding sees the distances of training."""

import pytest
import torch
from tiny import CONFIGS, ids_on, make_model, moved, run_of, said, small, steps
from transformers import AutoModelForCausalLM

from peftlab import adapters
from peftlab.base import weights
from peftlab.run import generate
from peftlab.run.generate import Decoding
from peftlab.run.scoring import nats_per_token

METHODS = ["prompt", "p-tuning", "prefix"]
FAMILIES = ["llama-tied", "gemma3", "gpt2", "opt"]
PROMPTS = [[5, 9, 200, 31], [7], [42, 43, 44, 45, 46, 47, 48, 300, 301], [11, 12, 13]]
EVERY = pytest.mark.parametrize("method", METHODS)
ON_EACH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Models in which what came before decides what is said; with the usual start they repeat the last token."""
    root, large = tmp_path_factory.mktemp("lively"), {"initializer_range": 0.25, "init_std": 0.25}
    for name in FAMILIES:
        folder = make_model(root / name, CONFIGS[name] | large)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.2)
        model.save_pretrained(folder)
    return {name: str(root / name) for name in FAMILIES}


@pytest.fixture
def steered(lively, toy_task, tmp_path):
    """A model with virtual tokens moved from where they started."""

    return lambda method, family: moved(run_of(small(lively[family], method), tmp_path).model, 0.3)


@EVERY
@ON_EACH
def test_in_training_it_is_pefts_own_forward(method, family, steered):
    model = steered(method, family).train()
    ids = ids_on(model, [[5, 6, 7, 8, 9], [9, 3, 4, 2, 7]])
    for options in ({}, {"logits_to_keep": 3}):
        torch.manual_seed(0)  # GPT-2 and OPT have dropout
        ours = model(input_ids=ids, use_cache=False, **options).logits
        torch.manual_seed(0)
        theirs = type(model).forward(model, input_ids=ids, use_cache=False, **options).logits
        assert ours.shape[:2] == (2, options.get("logits_to_keep", 5))
        assert torch.equal(ours, theirs[:, -ours.shape[1] :])
    plain = model.get_base_model()(input_ids=ids, use_cache=False).logits
    assert (ours - plain[:, -ours.shape[1] :]).abs().max() > 1e-2


@pytest.fixture
def decoded(monkeypatch):
    """(each prompt's tokens, and the logits they were picked from: prompts × steps × vocabulary)"""
    seen, pick = [], generate._pick
    monkeypatch.setattr(generate, "_pick", lambda logits, *rest: seen.append(logits.clone()) or pick(logits, *rest))

    def decode(model, prompts):
        seen.clear()
        return said(model, prompts, Decoding(6)), torch.stack(seen, 1)

    return decode


@EVERY
@ON_EACH
def test_a_batch_of_unequal_prompts_equals_each_alone_and_read_as_a_whole(method, family, steered, decoded):
    model = steered(method, family).eval()
    tokens, together = decoded(model, PROMPTS)
    for prompt, answer, row in zip(PROMPTS, tokens, together, strict=True):
        own, alone = decoded(model, [prompt])
        assert own == [answer] and torch.allclose(row[: alone.shape[1]], alone[0], atol=1e-3)
        with torch.no_grad():
            whole = type(model).forward(model, input_ids=ids_on(model, [prompt + answer]), use_cache=False).logits
        after = whole[0, -len(answer) - 1 : -1]  # the prompt's last position, and each token's but the last
        assert after.argmax(1).tolist() == answer and len(answer) == 6
        assert torch.allclose(after, row, atol=1e-3)
    _, unsteered = decoded(model.get_base_model(), PROMPTS)
    assert (unsteered[:, 0] - together[:, 0]).abs().amax(1).min() > 0.05  # what must agree hangs on the virtual tokens
    assert torch.pdist(together[:, 0]).min() > 0.05  # and on the prompts


@ON_EACH
def test_a_loaded_prefix_decodes_the_same(family, lively, toy_task, tmp_path):
    spec = small(lively[family], "prefix")
    run = run_of(spec, tmp_path)
    steps(run, 5)
    again = adapters.apply(run.base, adapters.read(adapters.save(run.model, spec, tmp_path / "adapter")))
    assert said(again, PROMPTS, Decoding(6)) == said(run.model.eval(), PROMPTS, Decoding(6))


@ON_EACH
def test_a_prefix_starts_as_the_keys_and_values_of_tokens(family, lively, toy_task, tmp_path, monkeypatch):
    """So before training the model answers as if those tokens came first."""
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **rest: drawn.append(randint(*args, **rest)) or drawn[-1])
    run = run_of(small(lively[family], "prefix"), tmp_path)
    (start,) = (t for t in drawn if t.shape == (1, 5))
    ids = ids_on(run.model, [[5, 6, 7, 8]])
    with torch.no_grad():
        read = run.base.model(input_ids=torch.cat([start.to(ids), ids], 1)).logits[:, 5:]
        assert torch.allclose(run.model.eval()(input_ids=ids).logits, read, atol=1e-4)


@ON_EACH
def test_prompt_tuning_starts_as_the_embeddings_of_tokens(family, lively, toy_task, tmp_path):
    run = run_of(small(lively[family], "prompt"), tmp_path)
    vectors, known = run.trained[0], run.base.model.get_input_embeddings()(ids_on(run.model, range(512)))
    start = torch.cdist(vectors.detach(), known).argmin(1)
    assert torch.allclose(known[start], vectors, atol=1e-6)
    ids = ids_on(run.model, [[5, 6, 7, 8]])
    with torch.no_grad():
        read = run.base.model(input_ids=torch.cat([start[None], ids], 1)).logits[:, 5:]
        assert torch.allclose(run.model.eval()(input_ids=ids).logits, read, atol=1e-4)


@EVERY
def test_the_prose_is_read_by_a_model_whose_context_virtual_tokens_fill(method, gpt2_model, toy_task, tmp_path):
    """GPT-2 has no position after its last: virtual tokens and text must share them."""
    model = run_of(small(gpt2_model, method, virtual_tokens=150), tmp_path).model.eval()
    base = weights.load(small(gpt2_model, method))
    assert 5 < nats_per_token(model, base.tokenizer) < 8
