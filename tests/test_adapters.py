import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import LLAMA, digest, logits, make_model, moved

from peftlab import AdapterError, RunSpec, SpecError, adapters, cli, compare, count, fused, methods, resolve, units
from peftlab.adapters import MANIFEST
from peftlab.base import architecture, fetching, models, weights
from peftlab.compare import study
from peftlab.data import tasks

CASES = [
    ("tiny_model", "lora"),
    ("tiny_model", "last-block"),
    ("tied_model", "full"),
    ("gpt2_model", "lora"),
    ("gpt2_model", "bitfit"),
]


def trained(folder, method, **settings):
    """A base, its resolved spec, and a model whose trained parameters have all been moved."""
    spec = resolve(RunSpec(model=str(folder), method=method, **{"precision": "fp32", **settings}))
    base = weights.load(spec)
    targets = methods.targets(architecture.of(str(folder)), spec)
    model = methods.find(method).attach(weights.share(base.model), targets, spec).eval()
    fused.quicken(moved(model))  # as the engine does
    return base, spec, model


@pytest.mark.parametrize("model, method", CASES)
def test_saved_read_and_applied_it_is_the_same_model(model, method, request, tmp_path):
    base, spec, made = trained(request.getfixturevalue(model), method)
    before = digest(base.model)
    folder = adapters.save(made, spec, tmp_path / "adapter", {"type": "done"})
    again = adapters.read(folder)
    assert again.spec.to_dict() == spec.to_dict() and (again.result, again.label) == ({"type": "done"}, tmp_path.name)
    applied = adapters.apply(base, again)
    assert logits(applied).equal(logits(made)) and not logits(applied).equal(logits(base.model))
    assert digest(base.model) == before
    assert not any(p.requires_grad for p in applied.parameters())
    assert {f.suffix for f in folder.iterdir()} == {".safetensors", ".json"}


class Killed(BaseException):
    """The end of the process, as far as a test can have it."""


@pytest.mark.parametrize("error", [OSError, Killed])
@pytest.mark.parametrize("broken", ["rmtree", "rename"])
def test_whenever_a_save_over_an_adapter_ends_one_of_the_two_is_there(broken, error, tiny_model, tmp_path, monkeypatch):
    """At each removal and each move in turn; and the next save is as any other."""
    base, spec, made = trained(tiny_model, "lora")
    folder = tmp_path / "adapter"
    for last in range(1, 9):
        adapters.save(made, spec, folder, {"which": "first"})
        place, name = (shutil, "rmtree") if broken == "rmtree" else (Path, "rename")
        work, calls = getattr(place, name), 0

        def fails(*args, work=work, last=last, **settings):
            nonlocal calls
            calls += 1
            if calls == last:
                raise error("the disk is gone")
            return work(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with suppress(OSError, Killed):
                adapters.save(made, spec, folder, {"which": "second"})
        left = adapters.read(folder)
        assert left.folder == folder or error is Killed
        assert left.result["which"] in ("first", "second")
        assert logits(adapters.apply(base, left)).equal(logits(made))
        if calls < last:
            break
    else:
        pytest.fail("it never got through")
    assert left.folder == folder and left.result == {"which": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_peft_loads_our_lora_with_no_help(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, spec, made = trained(tiny_model, "lora", rank=4, layers="last:2", target_modules="query,down")
    adapters.save(made, spec, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").to(made.device)
    theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    assert logits(theirs).allclose(logits(made), atol=1e-5)


def test_it_names_the_published_base_and_does_not_ask_for_it(tiny_model, tmp_path, monkeypatch):
    """Not this machine's folder: others are to load it. peft would ask the Hub for the base at every save."""
    import peft.utils.save_and_load

    monkeypatch.setitem(models.MODELS, "toy", models.BaseModel("toy", "Toy", 195_008, "nobody/toy", config=LLAMA))
    shutil.copytree(tiny_model, fetching.folder_of(models.find("toy")))
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *args: pytest.fail("asked"))
    base, spec, made = trained("toy", "lora")
    folder = adapters.save(made, spec, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "nobody/toy"
    (folder / MANIFEST).unlink()
    assert adapters.read(folder).spec == RunSpec(model="toy")
    assert logits(adapters.apply(base, adapters.read(folder))).equal(logits(made))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models that are not the tiny one: of other shapes, and of the same."""
    root = tmp_path_factory.mktemp("others")
    layers = {"shallow": {"num_hidden_layers": 2}, "deep": {"num_hidden_layers": 4}}
    changes = {"thin": {"hidden_size": 32}, **layers, "twin": {}}
    return {name: str(make_model(root / name, LLAMA | change)) for name, change in changes.items()}


@pytest.mark.parametrize(
    "method, name, said",
    [
        ("prompt", "thin", "its base is"), ("full", "twin", "its base is"), ("lora", "thin", ""), ("full", "thin", ""),
        ("houlsby", "thin", ""), ("lora", "shallow", ""), ("last-block", "shallow", ""), ("lora", "deep", "in the model only"),
        ("houlsby", "deep", "in the model only"), ("ia3", "shallow", ""),
    ],
)  # fmt: skip
def test_the_wrong_base_is_refused(method, name, said, others, tiny_model, tmp_path):
    """What would load without a word; and tensors that are not the base's, though the manifest says that they are."""
    _, spec, made = trained(tiny_model, method, sequence_length=96)
    claimed = spec if said == "its base is" else spec.but(model=others[name])
    adapter = adapters.read(adapters.save(made, claimed, tmp_path / "adapter"))
    other = weights.load(resolve(RunSpec(model=others[name])))
    with pytest.raises(AdapterError, match=f"does not fit {name} .*{said}.*choose its own base"):
        adapters.apply(other, adapter)


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("other", "", "no adapter there"),
        *(
            (MANIFEST, text, "manifest cannot be read")
            for text in ("", "[]", "{}", '{"spec": {"rank": 0}, "result": {}}')
        ),
        (MANIFEST, '{"spec": 3, "result": {}}', "manifest cannot be read"),
        (MANIFEST, '{"version": 2, "spec": {}, "result": {}}', "of version 2, .* reads up to 1; install a newer"),
        (MANIFEST, "[" * 20_000, "manifest cannot be read .*recursion"),
        (adapters.CONFIG, '{"base_model_name_or_path": null}', "manifest cannot be read .*names no base"),
    ],
)
def test_a_folder_without_a_readable_adapter_is_refused(file, text, said, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(AdapterError, match=said):
        adapters.read(tmp_path)


def test_a_pickled_adapter_is_refused_and_one_that_is_cut_short(tiny_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    base, spec, made = trained(tiny_model, "lora")
    short = adapters.save(made, spec, tmp_path / "short")
    os.truncate(short / "adapter_model.safetensors", 500)
    with pytest.raises(AdapterError, match="does not fit .*header"):
        adapters.apply(base, adapters.read(short))
    folder = adapters.save(made, spec, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safetensors"):
        adapters.apply(base, adapters.read(folder))


def test_a_pack_holds_the_folder(tiny_model, tmp_path):
    import zipfile

    _, spec, made = trained(tiny_model, "lora")
    folder = adapters.save(made, spec, tmp_path / "adapter")
    names = {n for n in zipfile.ZipFile(adapters.pack(folder)).namelist() if not n.endswith("/")}
    assert names == {f.name for f in folder.iterdir()}


FOLDERS = sorted(f.parent for f in adapters.BUNDLED.glob("*/peftlab.json"))
BUNDLED = pytest.mark.parametrize("adapter", adapters.bundled(), ids=lambda a: a.name)
MANIFESTS = pytest.mark.parametrize("folder", FOLDERS, ids=str)
CARD = (adapters.BUNDLED / "README.md").read_text(encoding="utf-8")


@MANIFESTS
def test_the_model_card_says_how_a_bundled_adapter_is_made_and_scores(folder):
    line = next(line for line in CARD.splitlines() if line.endswith(f"--out runs/{folder.name}"))
    asked = cli.spec_of(cli.parser().parse_args(line.split()[4:]))
    assert resolve(asked).but(gpu=None) == adapters.read(folder).spec.but(gpu=None)
    made = adapters.read(folder)
    measured, file = made.result["eval"], folder / adapters.TENSORS
    before, after = (units.score(next(iter(measured[when].values()))) for when in ("before", "after"))
    spec, full = made.spec, made.spec.method == "full"
    row = [
        f"`{folder.name}`",
        "full fine-tuning" if full else f"LoRA, rank {spec.rank}",
        "all weights" if full else spec.target_modules,
        units.size(file.stat().st_size) if file.exists() else "not kept",
        f"{before} → {after}",
        f"{made.result['forgetting']:.2f}",
        made.result["device"],
    ]
    assert f"| {' | '.join(row)} |" in CARD.splitlines()


@MANIFESTS
def test_the_study_beside_a_bundled_adapter_is_of_it(folder):
    found = study.recorded(adapters.read(folder))
    assert (found.adapter, found.method) == (folder.name, adapters.read(folder).spec.method)
    assert {m.role for m in found.matrices} == {"query", "value"} and len(found.matrices) == 60
    most = 576 if found.method == "full" else adapters.read(folder).spec.rank
    assert all(m.delta.rank <= most for m in found.matrices) and all(m.directions for m in found.matrices)


def test_the_adapters_that_are_studied_together_are_small_and_start_apart():
    folders = [adapters.BUNDLED / name for name in ("ticket-lora-r8", "ticket-lora-r64", "ticket-full")]
    assert sum(f.stat().st_size for folder in folders for f in folder.iterdir()) < 12e6
    assert len({adapters.read(folder).spec.seed for folder in folders}) == 3


@BUNDLED
def test_a_bundled_adapter_is_whole(adapter):
    from safetensors.torch import load_file

    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == count(resolve(adapter.spec)).trainable_parameters
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    assert config["r"] == adapter.spec.rank
    assert config["base_model_name_or_path"] == models.find(adapter.spec.model).hub_id


@BUNDLED
def test_a_bundled_adapters_record_is_what_its_scorer_says(adapter):
    report = compare.recorded(adapter)
    task = tasks.find(adapter.spec.task)
    assert len(report.exchanges) == 40 == len(task.heldout)
    for exchange, row in zip(report.exchanges, task.heldout, strict=True):
        assert (exchange.prompt, exchange.reference) == (row.prompt, row.answer)
        for reply in exchange.replies:
            assert reply.score == tasks.score(reply.text, row, task)
    base, adapted = report.scores
    measured = adapter.result["eval"]
    assert measured["before"][task.metric] == pytest.approx(base.mean)
    assert measured["after"][task.metric] == pytest.approx(adapted.mean) and measured["items"] == 40
    assert adapted.mean > base.mean and adapted.forgetting == adapter.result["forgetting"]


def test_a_merged_head_leaves_the_embedding_it_was_tied_to(tied_model, tmp_path):
    base, spec, made = trained(tied_model, "lora", target_modules="lm_head")
    before = digest(base.model)
    adapter = adapters.read(adapters.save(made, spec, tmp_path / "adapter"))
    merged = adapters.merge(base, adapter)
    assert logits(merged).allclose(logits(adapters.apply(base, adapter)), atol=1e-4)
    assert merged.get_input_embeddings().weight.equal(base.model.get_input_embeddings().weight)
    assert not merged.config.tie_word_embeddings and base.model.config.tie_word_embeddings
    assert digest(base.model) == before


def test_a_merged_norm_has_the_bases_type(tiny_model, tmp_path):
    import torch

    _, spec, made = trained(tiny_model, "ln")
    adapter = adapters.read(adapters.save(made, spec, tmp_path / "adapter"))
    half = weights.load(resolve(RunSpec(model=str(tiny_model), precision="bf16")))
    merged = adapters.merge(half, adapter)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert logits(merged).isfinite().all() and not logits(merged).equal(logits(half.model))


def test_virtual_tokens_saved_elsewhere_are_refused_in_words(tiny_model, tmp_path):
    base, spec, made = trained(tiny_model, "prompt", sequence_length=64)
    folder = adapters.save(made, spec, tmp_path / "adapter")
    (folder / MANIFEST).unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_model)}))
    with pytest.raises(SpecError, match="virtual tokens"):
        adapters.merge(base, adapters.read(folder))


@pytest.mark.parametrize("method, odd", [("lora", 3), ("ln", 3), ("full", 3), ("lora", 0)])
def test_what_is_not_finite_is_not_merged(method, odd, tiny_model, tmp_path):
    """peft's own check is a bare ValueError; ours says what to do, of an update too large for the weights too."""
    import torch

    base, spec, made = trained(tiny_model, method)
    with torch.no_grad():
        for p in [p for n, p in made.named_parameters() if p.requires_grad and "embed" not in n][: 1 if odd else None]:
            p.view(-1)[:3] *= torch.nan if odd else 1e30
    adapter = adapters.read(adapters.save(made, spec, tmp_path / "adapter"))
    total = count(spec).trainable_parameters
    with pytest.raises(
        AdapterError, match=rf"not finite \({odd} of its own {total:,} numbers .*; train again at a lower"
    ):
        adapters.merge(base, adapter)


def test_what_is_saved_and_downloaded_does_not_say_where_it_lies_on_this_machine(toy_spec, tmp_path):
    import zipfile

    from peftlab.run import train

    *_, done = train(resolve(toy_spec), tmp_path / "run")
    assert done["adapter"] == str(tmp_path / "run" / "adapter")  # which the command line prints
    adapter = adapters.read(done["adapter"])
    assert "adapter" not in adapter.result and adapter.result["steps"] == done["steps"]
    with zipfile.ZipFile(adapters.pack(adapter.folder)) as packed:
        assert not any(str(tmp_path).encode() in packed.read(name) for name in packed.namelist())


def test_an_adapter_of_a_room_has_the_name_of_its_file(tmp_path):
    job = f"intent-lora-{'7cb0' * 8}"
    for folder, label in {
        f"{job}/adapter": "intent-lora-b07cb0",
        "ticket-lora-20261130-1354/adapter": "ticket-lora-20261130-1354",
        "mine-abcdef/adapter": "mine-abcdef",
        "voice-lora": "voice-lora",
    }.items():
        expected = label if "7cb0" not in folder else f"intent-lora-{job[-6:]}"
        assert adapters.Adapter(tmp_path / folder, RunSpec(), {}).label == expected
