#!/usr/bin/env python3
"""Make the golden checkpoints and logits that lfm2c's numbers are tested against.

Hugging Face transformers is the oracle. This script writes small random checkpoints of the LFM2 family, loads each one
back with `from_pretrained` in float32 on the CPU, and records what it computes. What it wrote is committed, so that
nobody needs Python to run the tests.

Install (Python 3.11 or newer; about 2 GB with torch's CPU build):

    python3 -m venv .venv && .venv/bin/pip install -r tests/oracle/requirements.txt

Run, from the repository root:

    .venv/bin/python tests/oracle/make_goldens.py             # write every case under tests/goldens
    .venv/bin/python tests/oracle/make_goldens.py --check     # write nothing: recompute, compare with what is there
    .venv/bin/python tests/oracle/make_goldens.py --mutants   # write nothing: show that known bugs move the logits
    ... --only moe-base,dense    --out DIR

What it writes, one directory a case (a complete checkpoint directory, and the golden beside it):

    config.json                       spelled as save_pretrained spells it in some cases, as the model hub does in others
    model.safetensors                 or model-0000x-of-0000y.safetensors and model.safetensors.index.json
    golden.safetensors                for each prompt N = 0, 1, ...:
        ids.N      i32 [len]          the prompt
        logits.N   f32 [len, vocab]   the logits of every prompt position
        greedy.N   i32 [16]           the 16 tokens that greedy decoding adds; eos does not stop it
        experts.N  i32 [moe layers, len, k]
                                      (MoE cases) the experts chosen at each prompt position, in every MoE layer, that is
                                      layers num_dense_layers.. in order; within k by falling routing score

The truth is float32 arithmetic on the weights as stored: BF16 and F16 tensors are widened, exactly, before the first
multiplication. Attention and experts run in transformers' "eager" form; the column "noise" of the table says how far its
other forms (sdpa, grouped_mm) and float64 are from that. Greedy tokens come from its cached decoding, and are checked
against recomputing from the start.

A golden must not hang on the last bit of anything. Prompts are drawn again until, at every position of the prompt and of
its greedy continuation, the routing score of the last expert chosen is well above that of the first one not chosen, and
the best logit is well above the second. So every correct float32 implementation chooses the same experts and tokens.

Everything is seeded: same versions and same kind of CPU, same bytes.
"""

import argparse
import contextlib
import json
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_accelerate_available

TRANSFORMERS = "5.17.0"
NEW_TOKENS = 16
GREEDY_MARGIN = 1e-3  # best logit minus second best; logits are O(1)
ROUTING_MARGIN = 1e-4  # last expert chosen minus first not chosen; see routing_margin
NOISE = 5e-6  # relative L2 within which transformers' own implementations must agree
MANY = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65, 100, 199, 200]
FEW = [1, 2, 3, 4, 5, 8, 17, 33, 65]


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Case:
    name: str
    why: str
    config: dict
    packed: bool = False  # experts as gate_up_proj and down_proj rather than one tensor each
    dtypes: tuple = ("F32",)  # of tensor t: dtypes[crc32(t) % len]; expert_bias always stays F32
    shards: int = 1
    lengths: list = field(default_factory=lambda: FEW)
    bias_spread: float = 0.4
    gate_gain: float = 2.0
    score_scale: float = 1.0  # size of a typical routing score
    tiny_scores: bool = False

    @property
    def moe(self):
        return self.config["model_type"] == "lfm2_moe"


def conv_attn(pattern):
    return [{"c": "conv", "a": "full_attention"}[x] for x in pattern]


def moe(pattern, **overrides):
    """An lfm2_moe config in the spelling of save_pretrained 5.17."""
    config = {
        "architectures": ["Lfm2MoeForCausalLM"],
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "dtype": "float32",
        "eos_token_id": 7,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_types": conv_attn(pattern),
        "max_position_embeddings": 4096,
        "model_type": "lfm2_moe",
        "moe_intermediate_size": 16,
        "norm_eps": 1e-05,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": True,
        "transformers_version": TRANSFORMERS,
        "use_cache": True,
        "use_expert_bias": True,
        "vocab_size": 96,
    }
    return finish(config, overrides)


def dense(**overrides):
    """An lfm2 config; the spelling of layers, width, rope and tying is left to each case."""
    config = {
        "architectures": ["Lfm2ForCausalLM"],
        "bos_token_id": 1,
        "conv_L_cache": 3,
        "conv_bias": False,
        "eos_token_id": 7,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "lfm2",
        "norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "transformers_version": TRANSFORMERS,
        "use_cache": True,
        "vocab_size": 96,
    }
    return finish(config, overrides)


def finish(config, overrides):
    """Apply overrides; a value of `...` removes the key."""
    config = {**config, **overrides}
    return {k: config[k] for k in sorted(config) if config[k] is not ...}


CASES = [
    Case(
        "moe-base",
        "the released shape in small; packed experts; every prompt length",
        moe(
            "ccacac",
            intermediate_size=72,
            num_dense_layers=2,
        ),
        packed=True,
        lengths=MANY,
    ),
    Case(
        "moe-scale",
        "norm_topk_prob false, routed_scaling_factor 2.5",
        moe("caca", num_experts=6, norm_topk_prob=False, routed_scaling_factor=2.5),
    ),
    Case(
        "moe-no-dense",
        "num_dense_layers 0; normalised weights that are scaled all the same",
        moe("caac", num_dense_layers=0, routed_scaling_factor=0.75, num_experts=6, num_experts_per_tok=3),
        packed=True,
    ),
    Case(
        "moe-no-bias",
        "use_expert_bias false, no such tensor; rope theta 5e6",
        moe("ccac", num_experts=6, use_expert_bias=False, rope_parameters={"rope_theta": 5000000.0, "rope_type": "default"}),
    ),
    Case(
        "moe-tiny-scores",
        "sigmoid scores near 1e-4, where the 1e-6 of the normalisation shows",
        moe("caca", vocab_size=112),
        packed=True,
        bias_spread=6e-5,
        gate_gain=1.0,
        score_scale=1e-4,
        tiny_scores=True,
    ),
    Case(
        "dense",
        "no experts at all; width from block_ff_dim by the auto-adjust rule (110, 73, 87, 96); hub spelling",
        dense(
            block_auto_adjust_ff_dim=True,
            block_dim=32,
            block_ff_dim=110,
            block_ffn_dim_multiplier=1.2,
            block_multiple_of=12,
            block_norm_eps=0.5,  # ignored by transformers, and by us
            conv_dim=32,
            conv_dim_out=32,
            full_attn_idxs=[2, 4],
            num_hidden_layers=5,
            num_heads=4,
            rope_theta=10000.0,
            tie_embedding=True,
            torch_dtype="float32",
        ),
    ),
    Case(
        "dense-conv-bias",
        "conv_bias true: biases on in_proj, conv and out_proj; untied lm_head",
        dense(
            block_auto_adjust_ff_dim=False,
            conv_bias=True,
            dtype="float32",
            intermediate_size=56,
            layer_types=conv_attn("ccac"),
            num_hidden_layers=4,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            tie_word_embeddings=False,
        ),
    ),
    Case(
        "attention-first",
        "layer 0 is attention, 1 KV head, head_dim 12 that is not hidden / heads",
        moe("aacc", num_experts=6, num_key_value_heads=1, head_dim=12),
        packed=True,
    ),
    Case(
        "odd-widths",
        "hidden 30, as many KV heads as heads, widths 37 and 53, 7 experts top 3, vocabulary 101, norm_eps 1e-3",
        moe(
            "caca",
            hidden_size=30,
            intermediate_size=53,
            moe_intermediate_size=37,
            num_attention_heads=3,
            num_key_value_heads=3,
            num_dense_layers=2,
            num_experts=7,
            num_experts_per_tok=3,
            vocab_size=101,
            norm_eps=1e-3,
        ),
    ),
    Case(
        "bf16",
        "BF16 weights, F32 expert_bias, one tensor an expert matrix, three shards; hub spelling; every prompt length",
        moe(
            "cacac",
            dtype=...,
            torch_dtype="bfloat16",
            rope_parameters=...,
            rope_theta=1000000.0,
            tie_word_embeddings=...,
            tie_embedding=True,
            num_dense_layers=2,
        ),
        dtypes=("BF16",),
        shards=3,
        lengths=MANY,
    ),
    Case(
        "mixed",
        "BF16, F16 and F32 tensors in one file; untied lm_head; packed experts",
        moe("cac", dtype="bfloat16", tie_word_embeddings=False),
        packed=True,
        dtypes=("BF16", "F16", "F32"),
    ),
    Case(
        "conv-cache-4",
        "conv_L_cache 4, with biases, before MoE layers",
        moe("ccac", num_experts=6, conv_L_cache=4, conv_bias=True),
    ),
]


# ------------------------------------------------------------------------------------------------------- the checkpoint

TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def rng(*key):
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, key)).encode())))


def initial(case, name, shape):
    """One tensor of the checkpoint, in float32. Gains keep the residual stream and the logits O(1)."""
    r = rng(case.name, name)
    normal = r.standard_normal(shape)
    fan_in = shape[-1]
    if name.endswith("norm.weight"):
        value = r.uniform(0.5, 1.5, shape)
    elif name.endswith("expert_bias"):
        # Evenly spread, shuffled: no two experts alike, some well above and some well below the rest.
        value = r.permutation(np.linspace(-1, 1, shape[0])) * case.bias_spread
    elif name.endswith(".bias"):
        value = 0.3 * normal
    elif "embed_tokens" in name or "lm_head" in name:
        value = 1.5 * normal / np.sqrt(fan_in)
    elif "conv.conv.weight" in name:
        value = 1.2 * normal / np.sqrt(fan_in)
    elif "gate.weight" in name:
        value = case.gate_gain * normal / np.sqrt(fan_in)
    elif "out_proj" in name:
        value = 0.6 * normal / np.sqrt(fan_in)
    elif "down_proj" in name or "w2" in name:
        value = 1.2 * normal / np.sqrt(fan_in)
    elif "gate_up_proj" in name or "w1" in name or "w3" in name:
        value = 1.4 * normal / np.sqrt(fan_in)
    else:
        value = normal / np.sqrt(fan_in)
    if case.tiny_scores:
        # Channel 0 of the residual stream is one large constant (real models have such channels) that only the gates
        # read, with a negative weight. So gate logits sit near -9. The rest is scaled up to stand beside channel 0.
        if "embed_tokens" in name:
            value *= 2.0
            value[:, 0] = 14.0
        elif name.endswith(("out_proj.weight", "w2.weight")):
            value *= 2.5
            value[0, :] = 0.0
        elif "down_proj" in name:
            value *= 2.5
            value[:, 0, :] = 0.0
        elif name.endswith(("gate_up_proj", "w1.weight", "w3.weight")):
            value[..., 0] = 0.0
        elif name.endswith("operator_norm.weight"):
            value *= 2.0
            value[0] = 0.0
        elif name.endswith("ffn_norm.weight"):
            value *= 1.5
            value[0] = 1.0
        elif name.endswith("embedding_norm.weight"):
            value *= 0.6
            value[0] = 0.0
        elif name.endswith("gate.weight"):
            value[:, 0] = -1.8
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))


def unpack(tensors):
    """The packed expert tensors as one tensor each."""
    out = {}
    for name, t in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for j, m in enumerate(t):
                w1, w3 = m.chunk(2)
                out[f"{stem}.{j}.w1.weight"], out[f"{stem}.{j}.w3.weight"] = w1, w3
        elif leaf == "down_proj":
            for j, m in enumerate(t):
                out[f"{stem}.{j}.w2.weight"] = m
        else:
            out[name] = t
    return out


def write_checkpoint(case, directory):
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")

    # transformers names the tensors and gives their shapes, so that this script cannot disagree with it.
    shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).state_dict()
    if "lm_head.weight" in shapes and case.config.get("tie_word_embeddings", case.config.get("tie_embedding", True)):
        del shapes["lm_head.weight"]
    tensors = {name: initial(case, name, tuple(t.shape)) for name, t in shapes.items()}
    if not case.packed:
        tensors = unpack(tensors)
    for name, t in tensors.items():
        dtype = case.dtypes[zlib.crc32(name.encode()) % len(case.dtypes)]
        tensors[name] = t.to(TORCH_DTYPE["F32" if name.endswith("expert_bias") else dtype]).contiguous()

    names = sorted(tensors)
    if case.shards == 1:
        save_file({n: tensors[n] for n in names}, directory / "model.safetensors", metadata={"format": "pt"})
        return
    # Cut where the bytes say, so that one layer's tensors fall into two files.
    sizes = np.array([tensors[n].nbytes for n in names])
    shard_of = np.minimum((np.cumsum(sizes) - sizes) * case.shards // sizes.sum(), case.shards - 1)
    weight_map = {}
    for s in range(case.shards):
        file = f"model-{s + 1:05}-of-{case.shards:05}.safetensors"
        mine = [n for n, of in zip(names, shard_of) if of == s]
        save_file({n: tensors[n] for n in mine}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {
        "metadata": {"total_parameters": sum(t.numel() for t in tensors.values()), "total_size": int(sizes.sum())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ the oracle


def load(directory, attention="eager", experts="eager", dtype=torch.float32, device="cpu"):
    # Straight onto a GPU where accelerate is installed, else through the host's memory.
    straight = {"device_map": device} if device != "cpu" and is_accelerate_available() else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
        output_loading_info=True,
        **straight,
    )
    wrong = {k: v for k, v in info.items() if v}
    assert not wrong, f"{directory}: transformers did not load this as written: {wrong}"
    return model.eval() if straight else model.eval().to(device)


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


@contextlib.contextmanager
def watch_routers(model):
    """Yields a list that one forward fills with (scores, biased scores) [tokens, experts], an entry for each MoE layer."""
    seen, hooks = [], []
    for layer in model.model.layers:
        block = layer.feed_forward
        if hasattr(block, "gate"):
            bias = block.expert_bias if block.use_expert_bias else 0.0

            def hook(_module, _inputs, output, bias=bias, k=block.gate.top_k):
                router_logits, _, selected = output
                s = router_logits.sigmoid()
                # The hook recomputes what the router did; if it ever disagreed, the margins would mean nothing.
                assert torch.equal((s + bias).topk(k).indices, selected)
                seen.append((s, s + bias, selected))

            hooks.append(block.gate.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for h in hooks:
            h.remove()


def routing_margin(biased, k, scale):
    """Score of the last expert chosen minus that of the first not chosen, relative to their size (and never to less than
    `scale`): the smallest over all tokens. Where scores are O(1), the absolute margin is at least this."""
    top = biased.topk(k + 1).values
    return ((top[:, k - 1] - top[:, k]) / top[:, k - 1].abs().clamp(min=scale)).min().item()


def greedy_margin(logits):
    top = logits.topk(2).values
    return (top[:, 0] - top[:, 1]).min().item()


@torch.no_grad()
def greedy(model, prompt):
    """Greedy continuation with transformers' cache: the prompt at once, then a token at a time."""
    ids, cache, step = [], None, prompt
    for _ in range(NEW_TOKENS):
        out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        ids.append(out.logits[0, -1].argmax().item())
        cache, step = out.past_key_values, ids[-1:]
    return ids


@dataclass
class Prompt:
    ids: list
    new: list
    logits: torch.Tensor
    experts: torch.Tensor | None
    routing: float  # smallest routing margin, relative
    greedy: float  # smallest greedy margin
    changed: int  # token-layer pairs whose set of experts the bias changed
    routed: int  # token-layer pairs


def trial(case, model, ids):
    """The golden of one prompt, or None if anything in it is decided by a hair."""
    k = case.config.get("num_experts_per_tok")

    def look(tokens):
        with watch_routers(model) as seen:
            logits = logits_of(model, tokens)
        routing = min((routing_margin(biased, k, case.score_scale) for _, biased, _ in seen), default=float("inf"))
        clear = greedy_margin(logits) > GREEDY_MARGIN and routing > ROUTING_MARGIN
        return logits, seen, routing, clear and bool(torch.isfinite(logits).all())

    logits, seen, _, clear = look(ids)
    if not clear:
        return None
    experts = torch.stack([selected for _, _, selected in seen]).int() if seen else None
    new = greedy(model, ids)
    everything, seen, routing, clear = look(ids + new)
    if not clear:
        return None
    # With clear margins, decoding from the cache and recomputing from the start must choose the same tokens.
    assert everything[len(ids) - 1 : -1].argmax(-1).tolist() == new, f"{case.name}: cached decoding chose other tokens"
    changed = sum(
        (s.topk(k).indices.sort().values != selected.sort().values).any(-1).sum().item() for s, _, selected in seen
    )
    routed = sum(len(s) for s, _, _ in seen)
    return Prompt(ids, new, logits.float(), experts, routing, greedy_margin(everything), changed, routed)


def find_prompt(case, model, n, length):
    for attempt in range(200):
        # Token 0 is padding and 7 is eos: both are as good as any other token here, and may occur.
        ids = rng(case.name, "ids", n, attempt).integers(0, case.config["vocab_size"], length).tolist()
        if (found := trial(case, model, ids)) is not None:
            return found
    raise SystemExit(f"{case.name}: no prompt of length {length} with clear margins in 200 draws")


def rel_l2(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def noise(case, directory, prompts):
    """How far transformers' other implementations, and float64, are from what we record."""
    worst = 0.0
    for attention, experts in [("sdpa", "grouped_mm"), ("sdpa", "batched_mm")] if case.moe else [("sdpa", "eager")]:
        try:
            other = load(directory, attention, experts)
            worst = max(worst, max(rel_l2(logits_of(other, p.ids), p.logits) for p in prompts))
        except RuntimeError as e:  # torch's grouped kernels want aligned rows
            print(f"  {case.name}: {experts} cannot run here: {str(e).splitlines()[0][:100]}", file=sys.stderr)
    double = load(directory, dtype=torch.float64)
    return max(worst, max(rel_l2(logits_of(double, p.ids), p.logits) for p in prompts))


# ---------------------------------------------------------------------------------------------------------------- modes


def make(case, directory):
    write_checkpoint(case, directory)
    model = load(directory)
    prompts = [find_prompt(case, model, n, length) for n, length in enumerate(case.lengths)]
    tensors = {}
    for n, p in enumerate(prompts):
        tensors[f"ids.{n}"] = torch.tensor(p.ids, dtype=torch.int32)
        tensors[f"logits.{n}"] = p.logits.contiguous()
        tensors[f"greedy.{n}"] = torch.tensor(p.new, dtype=torch.int32)
        if p.experts is not None:
            tensors[f"experts.{n}"] = p.experts.contiguous()
    about = {"case": case.name, "why": case.why, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    save_file(tensors, directory / "golden.safetensors", metadata={"about": json.dumps(about, sort_keys=True)})

    for f in directory.iterdir():
        f.chmod(0o644)  # safetensors writes files that only their owner may read

    # What makes it a good golden, asserted, so that a change to this script cannot lose it.
    spread = torch.cat([p.logits for p in prompts]).std().item()
    assert 0.3 < spread < 5, f"{case.name}: logits of standard deviation {spread}"
    distinct = np.mean([len(set(p.new)) for p in prompts])
    assert distinct >= 5, f"{case.name}: greedy decoding is stuck, {distinct:.1f} distinct tokens of {NEW_TOKENS}"
    share = sum(p.changed for p in prompts) / max(1, sum(p.routed for p in prompts))
    if case.config.get("use_expert_bias"):
        assert share > 0.2, f"{case.name}: the bias changes the selection of only {share:.0%} of tokens"
    else:
        assert share == 0
    floor = noise(case, directory, prompts)
    assert floor < NOISE, f"{case.name}: transformers disagrees with itself by {floor:.1e}"
    report(
        case.name,
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{sum(f.stat().st_size for f in directory.iterdir()):,}",
        len(prompts),
        f"{min(p.routing for p in prompts):.1e}" if case.moe else "-",
        f"{min(p.greedy for p in prompts):.1e}",
        f"{share:.0%}" if case.moe else "-",
        f"{spread:.2f}",
        f"{distinct:.1f}",
        f"{floor:.1e}",
    )


def check(case, directory):
    golden = load_file(directory / "golden.safetensors")
    model = load(directory)
    worst = 0.0
    for n, _ in enumerate(case.lengths):
        ids = golden[f"ids.{n}"].tolist()
        with watch_routers(model) as seen:
            worst = max(worst, rel_l2(logits_of(model, ids), golden[f"logits.{n}"]))
        assert greedy(model, ids) == golden[f"greedy.{n}"].tolist(), f"{case.name}: greedy.{n} differs"
        if seen:
            experts = torch.stack([selected for _, _, selected in seen]).int()
            assert torch.equal(experts, golden[f"experts.{n}"]), f"{case.name}: experts.{n} differs"
    print(f"{case.name:18} worst relative L2 {worst:.1e}")
    assert worst < NOISE, f"{case.name}: not reproduced"


def router_mutant(kind):
    """A router forward with one known bug."""

    def forward(self, hidden_states, expert_bias=None):
        logits = F.linear(hidden_states, self.weight)
        s = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
        biased = s if expert_bias is None or kind == "bias-ignored" else s + expert_bias
        _, selected = biased.topk(self.top_k, dim=-1)
        w = (biased if kind == "bias-in-weights" else s).gather(1, selected)
        if self.norm_topk_prob != (kind == "norm-flipped"):
            w = w / (w.sum(-1, keepdim=True) + (0.0 if kind == "no-1e-6" else 1e-6))
        return logits, w * (1.0 if kind == "no-scaling" else self.routed_scaling_factor), selected

    def apply(model):
        for layer in model.model.layers:
            if hasattr(layer.feed_forward, "gate"):
                layer.feed_forward.gate.forward = forward.__get__(layer.feed_forward.gate)

    return apply


def for_each(method):
    def apply(model):
        for layer in model.model.layers:
            method(layer)

    return apply


def conv_reversed(layer):
    if hasattr(layer, "conv"):
        layer.conv.conv.weight.data = layer.conv.conv.weight.data.flip(-1)


def conv_roles(layer):
    if hasattr(layer, "conv"):
        b, c, x = layer.conv.in_proj.weight.data.chunk(3)
        layer.conv.in_proj.weight.data = torch.cat([c, b, x])


def conv_no_bias(layer):
    if hasattr(layer, "conv") and layer.conv.conv.bias is not None:
        layer.conv.conv.bias.data.zero_()


def swap_gate_up(layer):
    experts = getattr(layer.feed_forward, "experts", None)
    if experts is not None:
        experts.gate_up_proj.data = torch.cat(experts.gate_up_proj.data.chunk(2, 1)[::-1], 1)


def no_head_norm(layer):
    if hasattr(layer, "self_attn"):
        layer.self_attn.q_layernorm.forward = lambda x: x


def scale_from_hidden(layer):
    if hasattr(layer, "self_attn"):
        a = layer.self_attn
        a.scaling = (a.config.hidden_size // a.config.num_attention_heads) ** -0.5


def no_rope(model):
    rope = getattr(model.model, "pos_emb", None) or model.model.rotary_emb
    rope.inv_freq.zero_()


def default_theta(model):
    rope = getattr(model.model, "pos_emb", None) or model.model.rotary_emb
    rope.inv_freq.copy_(1e4 ** -torch.linspace(0, 1, 2 * len(rope.inv_freq) + 1)[0:-1:2])


def default_eps(model):
    for m in model.modules():
        if hasattr(m, "variance_epsilon"):
            m.variance_epsilon = 1e-6


MUTANTS = {
    **{k: router_mutant(k) for k in ("bias-in-weights", "bias-ignored", "softmax", "no-scaling", "no-1e-6", "norm-flipped")},
    "gate-up-swapped": for_each(swap_gate_up),
    "conv-reversed": for_each(conv_reversed),
    "conv-b-c-swapped": for_each(conv_roles),
    "conv-bias-dropped": for_each(conv_no_bias),
    "no-q-layernorm": for_each(no_head_norm),
    "scale-from-hidden": for_each(scale_from_hidden),
    "no-rope": no_rope,
    "theta-1e4": default_theta,
    "eps-1e-6": default_eps,
}


def mutants(cases, out):
    """For each known bug, the relative L2 error that it causes in each case. A bug that moves nothing is not tested."""
    print(f"{'':18}" + "".join(f"{c.name:>17}" for c in cases))
    for name, apply in MUTANTS.items():
        row = []
        for case in cases:
            golden = load_file(out / case.name / "golden.safetensors")
            model = load(out / case.name)
            apply(model)
            n = len(case.lengths) - 1
            row.append(rel_l2(logits_of(model, golden[f"ids.{n}"].tolist()), golden[f"logits.{n}"]))
        print(f"{name:18}" + "".join(f"{x:>17.1e}" for x in row))
        assert len(cases) < len(CASES) or max(row) > 1e-3, f"no golden notices {name}"


def report(*columns):
    widths = (18, 12, 11, 9, 11, 10, 10, 8, 10, 9)
    print("".join(f"{c!s:>{w}}" if i else f"{c!s:{w}}" for i, (c, w) in enumerate(zip(columns, widths))), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/goldens"), help="directory of the cases (tests/goldens)")
    parser.add_argument("--only", help="comma-separated names of cases")
    parser.add_argument("--check", action="store_true", help="recompute and compare, write nothing")
    parser.add_argument("--mutants", action="store_true", help="show what known bugs do to the logits, write nothing")
    args = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        sys.exit(f"the oracle is transformers {TRANSFORMERS}, not {transformers.__version__}")
    names = args.only.split(",") if args.only else [c.name for c in CASES]
    if unknown := set(names) - {c.name for c in CASES}:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}")
    cases = [c for c in CASES if c.name in names]
    torch.set_num_threads(1)  # the models are tiny, and one thread gives the same bytes on any number of cores
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    if args.mutants:
        mutants(cases, args.out)
    elif args.check:
        for case in cases:
            check(case, args.out / case.name)
    else:
        report("case", "parameters", "bytes", "prompts", "routing", "greedy", "biased", "logits", "distinct", "noise")
        for case in cases:
            make(case, args.out / case.name)
        total = sum(f.stat().st_size for c in CASES if (args.out / c.name).is_dir() for f in (args.out / c.name).iterdir())
        print(f"{total:,} bytes in all")


if __name__ == "__main__":
    main()
