"""Small models with random weights and a small task, for measurements that are about jobs and not about what is learned."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import seam
from ..base import models
from ..data import tasks
from ..data.tasks import Row, Task
from ..places import ROOT
from ..resolve import resolve
from ..run import Event, train
from ..run.scoring import PUBLIC_DOMAIN
from ..seeded import seeded
from ..spec import Json, RunSpec

APP = ROOT / "demos" / "page" / "small_app.py"
"""The page over the small models of a folder."""
HEAVY_IMPORTS = ("peft", "transformers.models.llama.modeling_llama", "safetensors.torch")
"""Imported once for all processes that train a run alone."""
COLOURS = {
    "sky": "blue",
    "grass": "green",
    "rose": "red",
    "sea": "blue",
    "leaf": "green",
    "blood": "red",
    "moss": "green",
}
TASK = Task(
    key=tasks.DEFAULT,
    name="Colours",
    teaches="Colours.",
    instruction="Name a colour.",
    metric="exact_match",
    train=tuple(Row(f"what colour is the {thing}?", colour) for thing, colour in COLOURS.items()),
    heldout=(
        Row("what colour is the cherry?", "red"),
        Row("and the pine?", "green"),
        Row("which is the lake?", "blue"),
    ),
    steps=20,
    batch_size=2,
    sequence_length=96,
    max_new_tokens=8,
)


@dataclass(frozen=True)
class Size:
    """Of a Llama with random weights."""

    width: int
    layers: int
    vocabulary: int


QUICK = Size(64, 3, 512)
"""A step takes milliseconds."""
HEAVY = Size(256, 2, 32_768)
"""About 70 MB in fp32, and half of it in bf16, nearly all of it embeddings, which cost little time."""


def make(folder: Path, count: int, size: Size) -> None:
    """Writes so many models into `folder`, each of other weights, and named by its number."""
    transformers = seam.library()
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=size.width, intermediate_size=5 * size.width // 2,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=size.vocabulary,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_words(), eos_token="<end>", pad_token="<pad>")
    for number in range(count):
        with seeded(number):
            transformers.LlamaForCausalLM(config).save_pretrained(folder / f"small-{number}")
        tokenizer.save_pretrained(folder / f"small-{number}")


def register(folder: Path) -> list[str]:
    """Puts the models of `folder` into this process's catalogue, the first in the default's place, and the task there too.

    Returns the models' keys.
    """
    folders = sorted(folder.iterdir(), key=lambda one: int(one.name.split("-")[1]))
    keys = [models.DEFAULT, *(one.name for one in folders[1:])]
    for key, one in zip(keys, folders, strict=True):
        models.MODELS[key] = replace(
            models.find(str(one)), key=key, name=key, hub_id=f"small/{key}", total_parameters=10**6
        )
    tasks.TASKS[tasks.DEFAULT] = TASK
    return keys


def alone(bases: Path, specs: Sequence[Json], out: Path) -> list[list[Event]]:
    """Trains each spec in a process of its own, where nothing else ran before; its adapter is in `out` under its number.

    Returns the events of each run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *HEAVY_IMPORTS])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(_train, [(bases, spec, out / str(n)) for n, spec in enumerate(specs)], chunksize=1)


def _train(bases: Path, spec: Json, out: Path) -> list[Event]:
    seam.quiet()
    register(bases)
    return list(train(resolve(RunSpec.from_dict(spec)), out))


def difference(one: Path, other: Path) -> float:
    """The largest difference of a number between two adapters; infinite where they are not alike."""
    from safetensors.torch import load_file

    from ..adapters import TENSORS

    if not (one / TENSORS).exists() or not (other / TENSORS).exists():
        return float("inf")
    first, second = load_file(one / TENSORS), load_file(other / TENSORS)
    if {n: (t.shape, t.dtype) for n, t in first.items()} != {n: (t.shape, t.dtype) for n, t in second.items()}:
        return float("inf")
    apart = [
        (first[n].double() - second[n].double()).abs().max().item()
        for n in first
        if not torch.equal(first[n], second[n])
    ]
    return max(apart, default=0.0)


def _words() -> object:
    """A tokenizer of bytes and a few hundred pairs of them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    made.train_from_iterator([PUBLIC_DOMAIN.read_text(encoding="utf-8"), *(row.prompt for row in TASK.train)], trainer)
    return made
