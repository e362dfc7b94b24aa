import pytest
import torch
from tiny import CONFIGS, attached, drain, fresh, ids_on, said

from peftlab import RunSpec, SpecError, resolve
from peftlab.base import weights
from peftlab.run import generate
from peftlab.run.generate import Decoding, Reader, Replayed, decode, stream
from peftlab.run.scoring import answer, mean_score, nats_per_token

PROMPTS = [[5, 9, 200, 31], [7], [42, 43, 44, 45, 46, 47, 48, 300, 301], [11, 12, 13]]


@pytest.fixture(params=["tiny_model", "tied_model", "gpt2_model"])
def base(request):
    return weights.load(resolve(RunSpec(model=str(request.getfixturevalue(request.param)), precision="fp32")))


def test_greedy_equals_transformers(base):
    width = max(map(len, PROMPTS))
    ids = ids_on(base.model, [[0] * (width - len(p)) + p for p in PROMPTS])
    mask = ids_on(base.model, [[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
    out = base.model.generate(ids, attention_mask=mask, **how)
    theirs = [row[width:].tolist() for row in out]
    theirs = [row[: row.index(0)] if 0 in row else row for row in theirs]
    assert said(base.model, PROMPTS, Decoding(12)) == theirs


def continued(model, prompts, tokens, fixed):
    """The logits of each row's next tokens after `prompts` when `tokens` follow, read with a growing or a fixed cache."""
    seen = []
    with torch.inference_mode():
        reader = Reader(model, prompts, 0)
        for i, token in enumerate(tokens):
            if fixed and i == 1:
                reader = Replayed.of(reader, len(tokens))
            seen.append(reader.logits().clone())
            reader.feed(torch.full((len(prompts),), token))
    return torch.stack(seen)


LIKE = [[9] * 10 + p for p in PROMPTS]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], LIKE], ids=["padded", "one", "alike"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fixed_cache_reads_as_a_growing_one(family, prompts):
    model, tokens = fresh(family).eval(), [31, 7, 200, 8, 5]
    grown = continued(model, prompts, tokens, False)
    assert continued(model, prompts, tokens, True).allclose(grown, atol=1e-5)


def test_a_window_that_has_slid_is_left_to_the_growing_cache():
    model = fresh("gemma3").eval()
    long = [[7] * (model.config.sliding_window + 3)]
    reader = Reader(model, long, 0)
    reader.feed(reader.logits().argmax(-1))
    assert Replayed.of(reader, 4) is None


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
def test_after_virtual_tokens_too(method, tiny_model):
    spec = RunSpec(model=str(tiny_model), method=method, virtual_tokens=5, sequence_length=64)
    model = attached("llama", spec).eval()
    tokens = [31, 7, 200, 8, 5]
    grown = continued(model, LIKE, tokens, False)
    assert continued(model, LIKE, tokens, True).allclose(grown, atol=1e-5)


def test_what_prompts_share_is_read_once(base):
    """And changes nothing: a batch of them equals each alone, which shares nothing."""
    said(base.model, LIKE, Decoding(1))  # how a model takes padding is tried once
    read = []
    base.model.get_input_embeddings().register_forward_hook(lambda m, args, out: read.append(tuple(args[0].shape)))
    together = said(base.model, LIKE, Decoding(10))
    assert read[0] == (1, 10) and read[1] == (4, max(map(len, PROMPTS)))
    said(base.model, [[1] * 20] * 2, Decoding(1))
    assert read[-2:] == [(1, 19), (2, 1)]
    base.model.get_input_embeddings()._forward_hooks.clear()
    assert together == [said(base.model, [p], Decoding(10))[0] for p in LIKE]


def test_decoding_stops_when_every_row_has_ended(base):
    first = said(base.model, [PROMPTS[0]], Decoding(6))[0]
    columns = list(decode(base.model, [PROMPTS[0]], first[2], Decoding(50)))
    ends = first.index(first[2])
    assert len(columns) == ends + 1 and columns[-1] == [None]


def test_sampling_hangs_on_its_seed_alone_and_rows_have_the_same_luck(base):
    """A row among others draws what it draws alone, so that the models of a comparison differ by their weights only."""

    def draw(seed, rows=1):
        *_, texts = stream(base.model, base.tokenizer, PROMPTS[0], Decoding(20, 1.5, seed=seed), rows)
        return texts

    assert draw(1) == draw(1) and draw(1, 3) == draw(1) * 3
    assert len({str(draw(s)) for s in range(4)}) > 1


NONSENSE = {"temperature": (-1, float("nan")), "max_new_tokens": (0,), "top_p": (0, 2), "seed": (-1, 2**63)}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NONSENSE.items() for value in values])
def test_decoding_refuses_nonsense(name, value):
    with pytest.raises(SpecError, match=name.replace("_", "-") + "="):
        Decoding(**{name: value})


def test_a_stream_grows_to_the_answer(base):
    texts = [text for (text,) in stream(base.model, base.tokenizer, PROMPTS[0], Decoding(6))]
    ids = said(base.model, [PROMPTS[0]], Decoding(6), base.tokenizer.eos_token_id)[0]
    assert len(texts) == len(ids) and texts[-1] == base.tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_are_scored_and_progress_is_told(base, toy_task):
    shares, answers = drain(answer(base.model, base.tokenizer, toy_task, toy_task.heldout))
    assert shares == [pytest.approx((i + 1) / toy_task.max_new_tokens) for i in range(len(shares))]
    assert [a.prompt for a in answers] == [r.prompt for r in toy_task.heldout]
    assert [a.score for a in answers] == [float(a.text.strip() == a.reference) for a in answers]
    assert mean_score(answers) == sum(a.score for a in answers) / 3


@pytest.mark.parametrize("window", [7, 512])
def test_nats_per_token_is_cross_entropy_and_reads_every_token_once_in_windows(window, base):
    text = "the cat sat on the mat and what colour is the sky"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        piece = ids_on(base.model, [ids[start : start + window + 1]])
        with torch.no_grad():
            total += base.model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
    found = nats_per_token(base.model, base.tokenizer, text, window)
    assert found == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_nats_per_token_begins_every_window_as_the_tokenizer_would(base, begun):
    text = "the cat sat on the mat"
    ids = ids_on(base.model, [begun(text)["input_ids"]])
    with torch.no_grad():
        logits = base.model(input_ids=ids).logits[0, 1:-1]
    direct = torch.nn.functional.cross_entropy(logits, ids[0, 2:]).item()
    assert nats_per_token(base.model, begun, text) == pytest.approx(direct, rel=1e-5)
    assert nats_per_token(base.model, base.tokenizer, text) != pytest.approx(direct, rel=1e-5)


def test_interleaved_streams_leave_gradients_on(base):
    """inference_mode must not outlive a token: streams that take turns would switch it on for the caller's thread."""
    streams = [stream(base.model, base.tokenizer, PROMPTS[0], Decoding(4)) for _ in range(2)]
    for each in streams * 3:
        next(each, None)
        assert not torch.is_inference_mode_enabled()
    for each in streams:
        each.close()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    draw = torch.Generator().manual_seed(0)
    drawn = [generate._pick(logits, Decoding(temperature=1.0), draw).item() for _ in range(3000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 3000
    assert shares.tolist() == pytest.approx(logits.softmax(-1)[0].tolist(), abs=0.03)
    for top_p, tokens in ((0.8, {1, 2}), (1e-6, {2})):
        assert {
            generate._pick(logits, Decoding(temperature=1.0, top_p=top_p), draw).item() for _ in range(300)
        } == tokens
