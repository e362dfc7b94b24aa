"""Tiny real models, made here: nothing is fetched and nothing is mocked."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from peftlab import RunSpec, adapters, methods, resolve
from peftlab.base import architecture, weights
from peftlab.data.tasks import Row, Task
from peftlab.memory import here
from peftlab.run.events import Work
from peftlab.run.generate import decode, gather
from peftlab.run.loop import Run

ROOT = Path(__file__).resolve().parent.parent
FREE = here._free
"""How much memory is free, which the tests otherwise do not know."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TIED = LLAMA | {"tie_word_embeddings": True}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256,
    "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA3 = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 32, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 32, "sliding_window": 32,
}  # as in the published ones, heads × head_dim is not hidden_size  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 512, "word_embed_proj_dim": 32, "max_position_embeddings": 256,
    "do_layer_norm_before": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "llama-tied": TIED, "gpt2": GPT2, "gemma3": GEMMA3, "qwen2": QWEN2, "opt": OPT}

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(folder: Path, config: dict, seed: int = 0, chat: bool = False) -> Path:
    """A model with random weights and its tokenizer, as the Hugging Face libraries save them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fresh(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return folder


def fresh(config: str | dict):
    """A randomly initialized model of a config, or of one of CONFIGS by name, in memory only."""
    values = dict(CONFIGS[config] if isinstance(config, str) else config)
    parsed = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return getattr(transformers, values["architectures"][0])(parsed)


def make_tokenizer(chat: bool):
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["the cat sat on the mat", "what colour is the sky", "red green blue answer"] * 3
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(words, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    if chat:
        made.chat_template = CHAT
    return made


COLOURS = {
    "sky": "blue", "grass": "green", "rose": "red", "sea": "blue", "leaf": "green", "blood": "red", "moss": "green",
    "brick": "red",
}  # fmt: skip
TOY = Task(
    key="toy",
    name="Toy colours",
    teaches="Colours.",
    instruction="Name a colour.",
    metric="exact_match",
    train=tuple(Row(f"what colour is the {thing}?", colour) for thing, colour in COLOURS.items()),
    heldout=(
        Row("what colour is the cherry?", "red"),
        Row("and the pine?", "green"),
        Row("what colour is the lake over there?", "blue"),
    ),
    steps=4,
    batch_size=2,
    sequence_length=96,
    max_new_tokens=4,
)


def drain(generator):
    """(everything it yielded, what it returned)"""
    work = Work(generator)
    return list(work), work.result


def digest(model) -> str:
    """sha256 over every parameter and buffer, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        total.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def attached(name: str, spec: RunSpec):
    """The model of CONFIGS[name] with the spec's method on it, as the engine attaches it."""
    spec = resolve(spec)
    targets = methods.targets(architecture.of(spec.model), spec)
    return methods.find(spec.method).attach(weights.share(fresh(name).requires_grad_(False)), targets, spec)


def run_of(spec: RunSpec, out: Path, eager: bool = False):
    """A run of a resolved spec, as `train` starts it, but for the evaluations; `eager`, it takes no CUDA graph."""
    return Run(resolve(spec), out, eager)


def steps(run, n: int) -> list[float]:
    """The losses of n steps over the task's own stream of batches."""
    stream, seen = iter(run.batches), []
    for _ in range(n):
        began = time.perf_counter()
        list(run.launch(next(stream)))
        seen += [event["loss"] for event in run.fetch(began)]
    return seen


def ids_on(model, rows):
    """Token ids, where the model is."""
    return torch.tensor(rows, device=next(model.parameters()).device)


def logits(model):
    """Of two rows; in evaluation mode, as adapters are used."""
    with torch.no_grad():
        return model.eval()(input_ids=ids_on(model, [[5, 6, 7, 8, 9], [9, 3, 4, 2, 7]])).logits


def small(model, method: str, **rest) -> RunSpec:
    """The resolved spec of a short run with a small adapter, in fp32 on every machine."""
    sizes = {"rank": 4, "virtual_tokens": 5, "bottleneck": 8, "block_size": 16}
    used = {name: size for name, size in sizes.items() if name in methods.METHODS[method].settings}
    given = {"task": "toy", "steps": 5, "precision": "fp32"} | used | rest
    return resolve(RunSpec(model=str(model), method=method, **given))


def moved(model, noise: float = 0.1):
    """`model` with every trained number moved at random, each time by as much."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn(p.shape, generator=draw).to(p))
    return model


def saved(model, method: str, folder: Path, noise: float = 0.1, **settings):
    """(base, adapter): the whole base in fp32, and on disk an adapter of it whose trained numbers were all moved."""
    given = {"quantization": "none", "precision": "fp32"} | settings
    spec = resolve(RunSpec(model=str(model), method=method, **given))
    base = weights.load(spec)
    on_whole = resolve(spec.but(method="lora" if method == "qlora" else method))  # the same adapter on a whole base
    targets = methods.targets(architecture.of(spec.model), on_whole)
    torch.manual_seed(0)
    attached = methods.find(on_whole.method).attach(weights.share(base.model), targets, on_whole)
    return base, adapters.read(adapters.save(moved(attached, noise), spec, folder / method))


def said(model, prompts, decoding, eos=0):
    """The tokens that `model` answers each prompt with."""
    *_, tokens = gather(decode(model, prompts, eos, decoding), len(prompts))
    return tokens


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(n, k, seed=0):
    """n × k with orthonormal columns, uniformly random."""
    return torch.linalg.qr(rand(n, k, seed=seed))[0]


def wait_for(condition, seconds=20):
    """Returns once `condition()` holds; fails where it does not in so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
