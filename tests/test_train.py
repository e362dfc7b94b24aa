import gc
import itertools
import json
import math
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny import drain, logits, run_of, small, steps

from peftlab import RunError, RunSpec, SpecError, adapters, hardware, resolve
from peftlab.base import weights
from peftlab.data import tasks
from peftlab.methods import METHODS
from peftlab.optimizers import OPTIMIZERS
from peftlab.run import CHECKPOINT, STOP, batches, engine, gears, loop, scoring, train
from peftlab.run.generate import Decoding, decode
from peftlab.run.scoring import answer, nats_per_token

DONE = {"type", "adapter", "steps", "stopped", "seconds", "training_seconds", "tokens_per_second", "train_loss", "eval", "forgetting",
        "predicted_peak_bytes", "measured_peak_bytes", "device"}  # fmt: skip
MACHINE = hardware.here()
on_cpu = pytest.mark.skipif(MACHINE.device != "cpu", reason="it is refused on a CPU only")


def losses(spec, out, **how):
    return [e["loss"] for e in train(resolve(spec), out, **how) if e["type"] == "step"]


def advance(events, kind):
    """Takes events until one of `kind` has come."""
    return next(event for event in events if event["type"] == kind)


def test_every_step_is_taken_in_training_mode(toy_spec, tmp_path, monkeypatch):
    """After an evaluation, too, for which the model leaves it."""
    took, modes = gears.Step.__call__, []

    def watched(step, *arguments):
        modes.append({module.training for module in step.model.modules()})
        return took(step, *arguments)

    monkeypatch.setattr(gears.Step, "__call__", watched)
    drain(train(resolve(toy_spec), tmp_path))
    assert modes == [{True}] * len(modes) and len(modes) >= 2


def test_events_come_in_order_with_the_contracts_keys(toy_spec, tmp_path):
    events = list(train(resolve(toy_spec), tmp_path))
    kinds = [e["type"] for e in events if e["type"] != "progress"]
    assert kinds == ["loading", "start", "eval", "step", "step", "eval", "step", "step", "eval", "done"]
    start, done = events[1], events[-1]
    assert start["trainable_parameters"] == 26_880 and start["metric"] == "exact_match"
    assert resolve(RunSpec.from_dict(start["spec"])) == resolve(toy_spec)
    assert set(done) == DONE and done["steps"] == 4 and not done["stopped"]
    assert {done[f"{how}_peak_bytes"] is None for how in ("predicted", "measured")} == {MACHINE.device == "cpu"}
    assert set(done["eval"]) == {"before", "after", "items"} and done["eval"]["items"] == 3
    assert done["train_loss"] == [e["loss"] for e in events if e["type"] == "step"][-1]
    assert isinstance(done["forgetting"], float) and done["tokens_per_second"] > 0
    told = [e for e in events if e["type"] == "step"]
    assert told[-1]["tokens_per_second"] == done["tokens_per_second"]
    assert {"peak_bytes" in e for e in told} == {MACHINE.device == "cuda"}
    assert MACHINE.device == "cpu" or told[-1]["peak_bytes"] == done["measured_peak_bytes"]
    assert [e["when"] for e in events if e["type"] == "eval"] == ["before", "during", "after"]
    assert json.dumps(events)
    adapter = adapters.read(done["adapter"])
    assert resolve(adapter.spec) == resolve(toy_spec)
    assert {k: adapter.result[k] for k in DONE - {"adapter"}} == {k: v for k, v in done.items() if k != "adapter"}
    assert "adapter" not in adapter.result  # a folder of this machine
    assert [r["reference"] for r in adapter.result["heldout"]] == ["red", "green", "blue"]


@on_cpu
def test_midway_a_cpu_scores_the_first_rows_alone(toy_spec, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MIDWAY", 2)
    events = list(train(resolve(toy_spec), tmp_path))
    scored = {e["when"]: (e["items"], len(e["examples"])) for e in events if e["type"] == "eval"}
    assert scored == {"before": (3, 3), "during": (2, 2), "after": (3, 3)}
    assert len(adapters.read(events[-1]["adapter"]).result["heldout"]) == 3


def test_a_base_is_asked_a_tasks_rows_once(toy_spec, tmp_path, monkeypatch):
    base, asked = weights.load(resolve(toy_spec)), []
    base.measured.clear()
    own = scoring.answer
    monkeypatch.setattr(scoring, "answer", lambda model, *rest: asked.append(model is base.quick) or own(model, *rest))
    first, second = (list(train(resolve(toy_spec), tmp_path / name)) for name in "ab")
    assert asked == [True]
    before = [next(e["examples"] for e in events if e["type"] == "eval") for events in (first, second)]
    assert before[0] == before[1]
    others = [replace(tasks.find("toy"), name=str(n)) for n in range(batches.TASKS_KEPT)]
    for task in others:
        drain(scoring.base_answers(base, task))
    assert list(base.measured["answers"]) == others


def test_a_tasks_rows_are_tokenized_once_for_a_base(toy_spec, tmp_path, monkeypatch):
    base, task, told = weights.load(resolve(toy_spec)), tasks.find("toy"), []
    base.measured.clear()
    own = batches.encode
    monkeypatch.setattr(batches, "encode", lambda *how: told.append(how[-1]) or own(*how))
    drawn = tasks.drawn(task, 2, seed=1)
    for rows in (task.train, drawn):
        assert batches.pairs_of(base, task, rows) == own(base.tokenizer, task, rows)
    assert told == [task.train]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_before_is_the_base_itself(method, toy_spec, tmp_path):
    """Virtual tokens change what it says before they have learned anything, and that is no score of the base."""
    spec = toy_spec.but(method=method, learning_rate=None)
    (*_, done) = train(resolve(spec), tmp_path)
    base = weights.load(resolve(spec))
    _, answers = drain(answer(base.model, base.tokenizer, tasks.find("toy"), tasks.find("toy").heldout))
    adapter = adapters.read(done["adapter"])
    assert [r["base"] for r in adapter.result["heldout"]] == [a.text for a in answers]
    prose = [nats_per_token(m, base.tokenizer) for m in (base.model, adapters.apply(base, adapter))]
    assert done["forgetting"] == pytest.approx(prose[1] - prose[0], abs=1e-5)


@pytest.mark.parametrize(
    "model, method, rate, share",
    [("tiny", "full", 5e-3, 0.6), ("tiny", "last-block", 0.02, 0.9), ("gpt2", "bitfit", 0.05, 0.9)],
)
def test_the_loss_falls(model, method, rate, share, request, toy_spec, tmp_path):
    """A frozen head of small random weights bounds the logits, so that only full fine-tuning can go far."""
    model = str(request.getfixturevalue(f"{model}_model"))
    seen = losses(toy_spec.but(model=model, method=method, learning_rate=rate, steps=20, batch_size=4), tmp_path)
    assert len(seen) == 20 and max(seen[-3:]) < share * seen[0]


def test_the_same_seed_gives_the_same_losses_and_the_caller_keeps_its_random_numbers(toy_spec, tmp_path):
    spec, state = toy_spec.but(dropout=0.3, seed=5), torch.get_rng_state()
    first = losses(spec, tmp_path / "1")
    assert torch.get_rng_state().equal(state)
    assert losses(spec, tmp_path / "2") == first != losses(spec.but(seed=6), tmp_path / "3")


@pytest.mark.parametrize("settings", [{"batch_size": 2, "accumulation": 2}, {"hold_outputs": True}], ids=str)
def test_what_changes_no_loss(settings, toy_spec, tmp_path):
    spec = toy_spec.but(batch_size=4)
    assert losses(spec.but(**settings), tmp_path / "1") == pytest.approx(losses(spec, tmp_path / "2"), rel=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("prefix", "bitfit")])
def test_checkpointing_changes_no_loss(method, tiny_model, toy_task, tmp_path):
    """Prefix refuses it (see below); BitFit has nothing to train here."""
    specs = [small(tiny_model, method, gradient_checkpointing=c) for c in (False, True)]
    runs = [run_of(spec, tmp_path, eager=True) for spec in specs]  # a graph's replays pass no module
    passes = [[], []]
    for run, seen in zip(runs, passes, strict=True):
        feed_forward = next(m for n, m in run.model.named_modules() if n.endswith("layers.1.mlp"))
        feed_forward.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(1))
    plain, recomputed = (steps(run, 3) for run in runs)
    assert len(passes[0]) == 3 and len(passes[1]) == 6  # forward, and once more within backward
    assert recomputed == pytest.approx(plain, rel=1e-5)
    for kept, again in zip(*(run.trained for run in runs), strict=True):
        assert again.allclose(kept, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_model", "tied_model", "gpt2_model"])
def test_answer_logits_alone_give_the_loss_of_all_logits(model, request, toy_task, tmp_path):
    """Against a right-padded batch with every logit, each prompt token masked by -100."""
    spec = resolve(RunSpec(model=str(request.getfixturevalue(model)), task="toy", precision="fp32"))
    run = run_of(spec, tmp_path)
    (batch,) = next(iter(run.batches))
    batch = replace(batch, data=batch.data.to(run.base.device))
    ids, labels = batch.data
    drops = model == "gpt2_model"
    with torch.no_grad():
        whole = run.base.model(input_ids=ids).logits
        direct = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for training, same in itertools.product((False,) if drops else (False, True), (batch, batch.trimmed())):
            run.model.train(training)
            loss, _ = run.gear.step.loss(same)
            assert loss.item() / batch.answers == pytest.approx(direct.item(), rel=1e-4)


@pytest.mark.parametrize("after", [None, "loading", "start", "progress"])
def test_a_stop_before_the_first_step_measures_nothing_and_leaves_no_adapter(after, toy_spec, tmp_path, monkeypatch):
    weights.load(resolve(toy_spec)).measured.clear()
    monkeypatch.setattr(engine, "nats_per_token", lambda *args: pytest.fail("nothing was learned, nothing forgotten"))
    events = train(resolve(toy_spec), tmp_path)
    if after:
        advance(events, after)
    (tmp_path / STOP).touch()
    *rest, done = events
    assert not rest or [e["type"] for e in rest] == ["start"]
    assert done["adapter"] is None and done["steps"] == 0 and "nothing was learned" in done["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def under_way(toy_spec, tmp_path):
    """The events of a run of 50 steps that has taken its first ones."""
    events = train(resolve(toy_spec.but(steps=50)), tmp_path)
    advance(events, "step")
    return events


@pytest.mark.parametrize("twice", [False, True])
def test_a_stop_midway_keeps_what_was_learned_and_a_second_ends_the_evaluation(twice, tmp_path, under_way):
    (tmp_path / STOP).touch()
    if twice:
        assert advance(under_way, "progress")["what"] == "measuring the held-out score"
        (tmp_path / STOP).touch()
    (*_, done) = under_way
    assert done["stopped"] and 1 <= done["steps"] < 50 and adapters.read(done["adapter"]).result["stopped"]
    assert (done["eval"]["after"] is None) == (done["forgetting"] is None) == twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", CHECKPOINT]  # to go on from


def test_a_closed_page_keeps_what_was_learned(toy_spec, tmp_path, under_way):
    under_way.close()
    assert adapters.apply(weights.load(resolve(toy_spec)), adapters.read(tmp_path / "adapter")) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def attached(monkeypatch):
    """The models that runs attach a method to, None once nothing holds them any more; nobody but a run looks for cycles."""
    made, attach = [], loop.attached

    def recorded(*args, **settings):
        model = attach(*args, **settings)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loop, "attached", recorded)
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_page_closed_before_the_first_step_leaves_nothing(stopped, toy_spec, tmp_path, attached):
    events = train(resolve(toy_spec), tmp_path)
    advance(events, "start")
    if stopped:
        (tmp_path / STOP).touch()
    events.close()
    assert list(tmp_path.iterdir()) == [] and [model() for model in attached] == [None]


def fails(*args):
    raise MemoryError("no more")


@pytest.mark.parametrize("module, part", [(loop, "why_eager"), (loop, "draws"), (engine, "nats_per_token")])
def test_a_run_that_fails_leaves_no_model_and_no_stop(module, part, toy_spec, tmp_path, attached, monkeypatch):
    """Nor does the error, which holds whatever was at work."""
    weights.load(resolve(toy_spec)).measured.clear()
    monkeypatch.setattr(module, part, fails)
    events = train(resolve(toy_spec), tmp_path)
    if part != "nats_per_token":
        advance(events, "loading")
        (tmp_path / STOP).touch()
    with pytest.raises(MemoryError, match="no more") as error:
        list(events)
    kept = ["adapter"] if part == "nats_per_token" else []
    assert [p.name for p in tmp_path.iterdir()] == kept and [model() for model in attached] == [None], error


@pytest.mark.parametrize("work", [engine.pace, engine.warm_up])
def test_a_rehearsal_that_fails_leaves_no_model(work, toy_spec, attached, monkeypatch):
    """On a GPU, as far as it is asked."""
    base = weights.load(resolve(toy_spec))
    monkeypatch.setattr(weights, "load", lambda spec: base)
    monkeypatch.setattr(gears.Step, "loss", fails)
    monkeypatch.setattr(engine.hardware, "here", lambda: replace(MACHINE, device="cuda"))
    with pytest.raises(RunError, match="no more") as error:
        work(resolve(toy_spec))
    assert [model() for model in attached] == [None], error


def test_a_save_that_fails_at_the_end_still_cleans_up(tmp_path, attached, under_way, monkeypatch):
    (tmp_path / STOP).touch()
    monkeypatch.setattr(adapters, "save", fails)
    with pytest.raises(MemoryError, match="no more") as error:
        under_way.close()
    assert list(tmp_path.iterdir()) == [] and [model() for model in attached] == [None], error


@pytest.fixture
def spoiled(monkeypatch):
    """Makes `change` of the loss at the steps (from 1) that are named, because clipping keeps this model finite at any rate
    that is allowed. Returns what the trained parameters were after each step."""

    def spoil(change, at):
        after = {}
        loss, step = gears.Step.loss, gears.Step.__call__

        def changed(self, batch):
            value, held = loss(self, batch)
            return (change(self, value) if self.done + 1 in at else value), held

        def recorded(self, pieces, answers):
            result = step(self, pieces, answers)
            after[self.done] = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            return result

        monkeypatch.setattr(gears.Step, "loss", changed)
        monkeypatch.setattr(gears.Step, "__call__", recorded)
        return after

    return spoil


def ending(spec, out):
    """The steps whose losses came, and the error that ended the run."""
    seen = []
    with pytest.raises(RunError) as error:
        for event in train(resolve(spec), out, eager=True):  # what is spoiled has to be asked for at each step
            if event["type"] == "step":
                seen.append(event["step"])
    return seen, str(error.value)


def saved(out, spec):
    """The trained parameters of the adapter that a run left."""
    model = adapters.apply(weights.load(resolve(spec)), adapters.read(out / "adapter"))
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "method, at", [("lora", 1), ("lora", 2), ("lora", 8), ("houlsby", 17), ("full", 17), ("prompt", 8)]
)
def test_what_was_learned_before_a_divergence_is_kept(method, at, toy_spec, tmp_path, spoiled):
    """The next step's loss shows whether a step was sound. At step 8 no adapter was saved yet, at 17 that of the middle was."""
    after = spoiled(lambda step, loss: loss * math.nan, at=[at])
    spec = toy_spec.but(method=method, steps=20 if at > 2 else 4)
    seen, said = ending(spec, tmp_path)
    assert seen == list(range(1, at))
    lower = 0.0001 if method == "full" else 0.0025  # the method's own, where that is lower than a quarter
    assert said.startswith(
        f"the loss is nan at step {at}: training diverged at a learning rate of 0.01; try {lower:g}. "
    )
    if at <= 2:  # the last sound state is the start
        assert said.endswith(". Nothing had been learned before that.") and list(tmp_path.iterdir()) == []
        return
    step = int(re.search(r"\. The adapter as it was after step (\d+) is kept\.$", said)[1])
    assert at - 1 - 20 / loop.SNAPSHOTS <= step < at
    kept, then = saved(tmp_path, spec), after[step]
    if method != "prompt":
        assert all(torch.equal(kept[n], p) for n, p in then.items())
    else:  # the vectors have another name where peft loads them
        (vectors,) = then.values()
        assert any(p.shape == vectors.shape and torch.equal(p, vectors) for p in kept.values())
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_loss_that_stays_above_guessing_ends_the_run(toy_spec, tmp_path, spoiled):
    after = spoiled(lambda step, loss: loss * 2.5, at=range(6, 21))
    seen, said = ending(toy_spec.but(steps=20), tmp_path)
    assert seen == list(range(1, 6 + loop.PATIENCE - 1))
    assert re.match(r"the loss is 1\d(\.\d)? at step 8: .*The adapter as it was after step 4 is kept\.", said), said
    kept = saved(tmp_path, toy_spec)
    assert all(torch.equal(kept[n], p) for n, p in after[4].items())


def test_a_spike_does_not(toy_spec, tmp_path, spoiled):
    spoiled(lambda step, loss: loss * 2.5, at=[6, 7, 9, 11, 13, 20])
    assert len(losses(toy_spec.but(steps=20), tmp_path, eager=True)) == 20


def test_a_gradient_that_is_not_finite_ends_the_run(toy_spec, tmp_path, spoiled):
    """The square root's slope at 0 is infinite, its value is 0."""
    spoiled(lambda step, loss: loss + (step.trained[0].sum() * 0).sqrt(), at=[9])
    seen, said = ending(toy_spec.but(steps=20), tmp_path)
    assert seen[-1] == 8 and "the gradient's norm is nan at step 9: " in said
    assert "after step 6 is kept" in said and adapters.read(tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sequence_length": 8}, "sequence-length=8: the longest example of toy has .* set it to"),
        ({"method": "full", "quantization": "nf4"}, "quantization=nf4.*set it to none"),
        ({"method": "pissa", "quantization": "int8"}, "quantization=int8.*set it to none"),
        ({"method": "prefix", "gradient_checkpointing": True}, "gradient-checkpointing=true.*turn it off"),
        ({"n_gpus": 2}, "n-gpus=2.*set it to 1"),
        pytest.param({"precision": "amp"}, "precision=amp.*fp32", marks=on_cpu),
        ({"method": "bitfit"}, "no bias"),
        ({"model": "bert-base"}, "no causal language model"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(toy_spec, tmp_path, settings, said):
    with pytest.raises(SpecError, match=said):
        list(train(resolve(toy_spec.but(**settings)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_can_be_run(optimizer, toy_spec, tmp_path):
    rate = {"sgd": 0.5, "sgd-momentum": 0.05, "lion": 1e-3, "adafactor": 0.5}.get(optimizer, 0.01)
    seen = losses(toy_spec.but(optimizer=optimizer, learning_rate=rate, steps=12, batch_size=4), tmp_path)
    assert all(map(math.isfinite, seen)) and max(seen[-3:]) < seen[0]


@pytest.mark.parametrize("adapter_precision", ["bf16", "fp32"])
def test_adamw_with_fp32_states(adapter_precision, toy_spec, tmp_path):
    spec = resolve(toy_spec.but(optimizer_precision="fp32", adapter_precision=adapter_precision, rank=4))
    run = run_of(spec, tmp_path)
    steps(run, 2)
    held = [t for state in run.gear.step.optimizer.state.values() for t in state.values()]
    states = [t for t in held if isinstance(t, torch.Tensor) and t.dim()]
    assert len(states) == 2 * len(run.trained) and {t.dtype for t in states} == {torch.float32}
    assert {p.dtype for p in run.trained} == {torch.bfloat16 if adapter_precision == "bf16" else torch.float32}


def test_two_at_once_train_as_each_alone(toy_spec, tmp_path):
    specs = [toy_spec.but(steps=6, seed=1, dropout=0.2), toy_spec.but(steps=6, seed=2, method="full")]
    alone = [losses(s, tmp_path / f"alone-{i}") for i, s in enumerate(specs)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(losses, specs, (tmp_path / "both-0", tmp_path / "both-1"))) == alone


PRECISIONS = [
    (m, p) for m in METHODS if m != "bitfit" for p in ("bf16", "fp32") if p == "bf16" or not METHODS[m].in_place
]


@pytest.mark.parametrize("method, precision", PRECISIONS)
def test_an_adapter_on_a_bf16_base(method, precision, tiny_model, toy_task, tmp_path):
    """Trains, is saved, and runs again in bf16."""
    spec = small(tiny_model, method, precision="bf16", adapter_precision=precision)
    run = run_of(spec, tmp_path)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert {p.dtype for p in run.trained} == {dtype} and run.base.model.dtype == torch.bfloat16
    assert all(map(math.isfinite, steps(run, 2)))
    learned = logits(run.model)
    assert learned.dtype == torch.bfloat16 and learned.isfinite().all()
    again = adapters.apply(run.base, adapters.read(adapters.save(run.model, spec, tmp_path / "adapter")))
    assert torch.allclose(logits(again), learned, atol=1e-2)
    assert len(list(decode(again, [[5, 6, 7]], -1, Decoding(3)))) == 3
