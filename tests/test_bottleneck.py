"""Bottleneck adapters are our own, so each is held against its paper's formula, computed here by hand."""

import pytest
import torch
from tiny import CONFIGS, fresh, moved

from peftlab import RunSpec, methods, resolve
from peftlab.base import architecture, weights
from peftlab.methods import METHODS

OURS = ["houlsby", "pfeiffer", "parallel", "post-attention", "io-adapter", "compacter"]


def adapted(config_files, family, method, **settings):
    """(a base, the same with the method on it, its adapters no longer the identity)"""
    spec = resolve(RunSpec(model=config_files[family], method=method, bottleneck=8, **settings))
    base = fresh(family).requires_grad_(False).eval()
    targets = methods.targets(architecture.of(spec.model), spec)
    return base, moved(METHODS[method].attach(weights.share(base), targets, spec).eval(), 0.3)


def kronecker(rules, s, t):
    """Compacter, section 4: the sum of Kronecker products of shared matrices and ones of rank one. d_in × d_out."""
    return sum(torch.kron(a, torch.outer(s[i], t[i])) for i, a in enumerate(rules))


def branch(adapter, rules=None):
    """x → up(gelu(down(x))), written out."""

    def linear(x, part):
        weight = part.weight.T if rules is None else kronecker(rules, part.s, part.t)
        return x @ weight + part.bias

    return lambda x: linear(torch.nn.functional.gelu(linear(x, adapter.down)), adapter.up)


def by_hand(method, base, model, ids):
    """The logits of a Llama with the method's adapters where its paper has them, from the frozen base's parts."""
    rules = next((m.rules for m in model.modules() if hasattr(m, "rules")), None)
    x = base.model.embed_tokens(ids)
    if method == "io-adapter":
        x = x + branch(model.model.embed_tokens.adapter)(x)
    positions = base.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for layer, changed in zip(base.model.layers, model.model.layers, strict=True):
        attention, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=positions, attention_mask=None)
        if method in ("houlsby", "post-attention", "compacter"):
            attention = attention + branch(changed.self_attn.o_proj.adapter, rules)(attention)
        x = x + attention
        h = layer.post_attention_layernorm(x)
        out = layer.mlp(h)
        if method in ("houlsby", "pfeiffer", "compacter"):
            out = out + branch(changed.mlp.down_proj.adapter, rules)(out)
        elif method == "parallel":
            out = out + branch(changed.mlp.down_proj.adapter)(h)
        x = x + out
    x = base.model.norm(x)
    if method == "io-adapter":
        x = x + branch(model.lm_head.adapter)(x)
    return base.lm_head(x)


@pytest.mark.parametrize("method", OURS)
def test_forward_is_the_papers_formula(method, config_files):
    base, model = adapted(config_files, "llama", method)
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 2, 7]])
    with torch.no_grad():
        ours, plain = model(input_ids=ids).logits, base(input_ids=ids).logits
        assert torch.allclose(ours, by_hand(method, base, model, ids), atol=1e-5)
        assert torch.allclose(plain, by_hand("none", base, model, ids), atol=1e-5)  # the hand is right
        assert (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "llama"])
def test_parallel_reads_what_the_feed_forward_reads(family, config_files):
    """Whatever the sub-layer is called: beside OPT's fc1 and fc2, which have no module of their own, too."""
    _, model = adapted(config_files, family, "parallel")
    read, added, modules = [], [], dict(model.named_modules())
    entrance, exit_ = {
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
        "opt": ("model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
    }.get(family, ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"))
    modules[entrance].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    modules[exit_].adapter.register_forward_pre_hook(lambda module, args: added.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(read) == len(added) == 1 and read[0] is added[0]
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    held = [n for n, m in model.named_modules() for v in vars(m).values() if torch.is_tensor(v) and id(v) not in own]
    assert held == [], "an activation outlives its pass"


@pytest.mark.parametrize("method", [m for m in OURS if "layers" in METHODS[m].settings])
def test_only_the_chosen_layers_have_one_in_the_datas_type(method, config_files):
    _, model = adapted(config_files, "llama", method, layers="0,2")
    with_one = {n.split(".")[2]: m for n, m in model.named_modules() if n.endswith(".adapter")}
    assert sorted(with_one) == ["0", "2"] and with_one["0"](torch.ones(1, 64).bfloat16()).dtype == torch.bfloat16
