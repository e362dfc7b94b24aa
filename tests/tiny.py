"""Tiny real models, made here: nothing is fetched and nothing is mocked."""

from __future__ import annotations

from pathlib import Path

from peftlab import RunSpec, resolve
from peftlab.data.tasks import Row, Task

ROOT = Path(__file__).resolve().parent.parent

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
    import torch
    import transformers

    values = dict(config)
    parsed = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, config["architectures"][0])(parsed)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    make_tokenizer(chat).save_pretrained(folder)
    return folder


def make_tokenizer(chat: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["the cat sat on the mat", "what colour is the sky", "red green blue answer"] * 3
    bpe.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    if chat:
        made.chat_template = CHAT
    return made


TOY_ROWS = tuple(
    Row(f"what colour is the {thing}?", colour)
    for thing, colour in (
        ("sky", "blue"), ("grass", "green"), ("rose", "red"), ("sea", "blue"), ("leaf", "green"), ("blood", "red"),
        ("moss", "green"), ("brick", "red"),
    )
)  # fmt: skip
TOY = Task(
    key="toy",
    name="Toy colours",
    teaches="Colours.",
    instruction="Name a colour.",
    metric="exact_match",
    train=TOY_ROWS,
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
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as finished:
            return seen, finished.value


def digest(model) -> str:
    """sha256 over every parameter and buffer, by name."""
    import hashlib

    import torch

    total = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0]):
        total.update(name.encode())
        total.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.dim()
            else str(tensor.item()).encode()
        )
    return total.hexdigest()


def fresh(name: str):
    """A randomly initialized model of one of CONFIGS, in memory only."""
    import transformers

    config = CONFIGS[name]
    values = dict(config)
    parsed = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return getattr(transformers, config["architectures"][0])(parsed)


def attached(name: str, spec: RunSpec):
    """The model of CONFIGS[name] with the spec's method on it, as the engine attaches it."""
    from peftlab import methods
    from peftlab.base import architecture, weights

    spec = resolve(spec)
    targets = methods.targets(architecture.of(spec.model), resolve(spec))
    base = fresh(name).requires_grad_(False)
    return methods.find(spec.method).attach(weights.share(base), targets, resolve(spec))


def run_of(spec: RunSpec, out: Path, eager: bool = False):
    """A run of a resolved spec, as `train` starts it, but for the evaluations; `eager`, it takes no CUDA graph."""
    from peftlab.run.loop import Run

    return Run(resolve(spec), out, eager)


def steps(run, n: int) -> list[float]:
    """The losses of n steps over the task's own stream of batches."""
    import time

    stream, seen = iter(run.batches), []
    for _ in range(n):
        began = time.perf_counter()
        list(run.launch(next(stream)))
        seen += [event["loss"] for event in run.fetch(began)]
    return seen


def ids_on(model, rows):
    """Token ids, where the model is."""
    import torch

    return torch.tensor(rows, device=next(model.parameters()).device)


def logits(model):
    """Of two rows; in evaluation mode, as adapters are used."""
    import torch

    ids = ids_on(model, [[5, 6, 7, 8, 9], [9, 3, 4, 2, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


SMALL = {"rank": 4, "virtual_tokens": 5, "bottleneck": 8, "block_size": 16}


def small(model, method: str, **rest) -> RunSpec:
    """The resolved spec of a short run with a small adapter, in fp32 on every machine."""
    from peftlab.methods import METHODS

    used = {k: v for k, v in SMALL.items() if k in METHODS[method].settings}
    return resolve(
        RunSpec(model=str(model), method=method, task="toy", **{"steps": 5, "precision": "fp32", **used, **rest})
    )


def moved(model, noise: float = 0.1):
    """`model` with every trained number moved at random, each time by as much."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn(p.shape, generator=draw).to(p))
    return model


def saved(model, method: str, folder: Path, noise: float = 0.1, **settings):
    """(base, adapter): the whole base in fp32, and on disk an adapter of it whose trained numbers were all moved."""
    import torch

    from peftlab import adapters, methods
    from peftlab.base import architecture, weights

    given = {"quantization": "none", "precision": "fp32", **settings}
    spec = resolve(RunSpec(model=str(model), method=method, **given))
    base = weights.load(spec)
    on_whole = resolve(spec.but(method="lora" if method == "qlora" else method))  # the same adapter on a whole base
    targets = methods.targets(architecture.of(spec.model), on_whole)
    torch.manual_seed(0)
    attached = methods.find(on_whole.method).attach(weights.share(base.model), targets, on_whole)
    return base, adapters.read(adapters.save(moved(attached, noise), spec, folder / method))


def said(model, prompts, decoding, eos=-1):
    """The tokens that `model` answers each prompt with."""
    from peftlab.run.generate import decode

    rows = [[] for _ in prompts]
    for column in decode(model, prompts, eos if eos >= 0 else 0, decoding):
        for row, token in zip(rows, column, strict=True):
            if token is not None:
                row.append(token)
    return rows


def rand(*shape, seed=0):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(n, k, seed=0):
    """n × k with orthonormal columns, uniformly random."""
    import torch

    return torch.linalg.qr(rand(n, k, seed=seed))[0]


def wait_for(condition, seconds=20):
    """Returns once `condition()` holds; fails where it does not in so many seconds."""
    import time

    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
