#!/usr/bin/env python3
"""Compare lfm2c with Hugging Face transformers at the shape of LFM2-8B-A1B, with random weights.

The committed goldens are tiny. This shows that the numbers hold at full size too: 24 layers, 32 experts, 8.3 B parameters in
bf16, drawn as transformers initialises them. It needs no download, one H200 (or other GPU of 80 GB), 20 GB of disk and a few
minutes. The truth is transformers in float32 (eager attention and experts, no TF32) on those weights.

    python3 tests/oracle/compare_8b.py --lfm2c target/release/lfm2c --dir /tmp/8b                          # on an H200
    .venv/bin/python tests/oracle/compare_8b.py --lfm2c target/release/lfm2c --dir /tmp/tiny --tiny --device cpu

It exits 0 only if every criterion holds:

    forced      every prompt position's logits, over all prompts together, with the truth's choice of experts forced on both
                sides, so that only arithmetic differs.
                f32: relative L2 error at most 1e-4, no logit further off than 1e-3.
                bf16, f16: relative L2 error at most 1.2 times that of transformers itself in that type. transformers runs as
                it would by default (sdpa, grouped_mm), but for sums in bf16 and f16 inside cuBLAS, which are off.
    free        64 greedy tokens after each prompt, all prompts as one batch, with nothing forced, in f32 and bf16. Each
                sequence is compared up to its first token that differs. That difference needs an excuse: the truth's best
                two logits there are closer than 8 times the largest forced error of that type; or, there or before, in some
                layer the last expert chosen and the first not chosen are closer than 8 times the error of routing scores.
                lfm2c does not tell its routing scores: the error is that of transformers' own in that type, scaled up by
                how much larger lfm2c's largest error in logits is, if it is. Tokens without any excuse at or before them
                "must agree"; in f32 there must be some, or nothing was tested. In bf16 there may well be none.

Printed beside: "HF agree", how many tokens transformers itself gets right in bf16, with nothing forced.

In DIR it leaves the checkpoint, golden.safetensors (as make_goldens.py writes it, and for each prompt margin.N and routing.N:
by how much each new token was chosen, and the experts of each position) and the plans. A later run with the same DIR takes
what is complete and made of the same settings, so that only lfm2c runs again. Delete DIR to start over.

To see it fail: copy DIR's checkpoint (links will do), plant a bug in the copy's config.json, such as routed_scaling_factor
1.01, and name the copy with --lfm2c-model.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no kernels from the hub: they are other implementations

import numpy as np
import torch
import transformers
from make_goldens import TORCH_DTYPE, TRANSFORMERS, load, logits_of, moe, rng, unpack, watch_routers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 200, 512]
NEW_TOKENS = 64
BIAS_SPREAD = 0.1  # of expert_bias; transformers starts it at 0, where it would not matter
SHARD_BYTES = 4 << 30
F32_ERROR, F32_LARGEST = 1e-4, 1e-3
OWN_FACTOR = 1.2  # times transformers' own error in the same type
MARGIN_FACTOR = 8  # times the error: a closer decision may fall either way
FORCED = ["f32", "bf16", "f16"]
FREE = ["f32", "bf16"]
BUCKETS = "--prefill 16,64,512 --decode 1,16 --max-sequences 16 --max-context 1024".split()

FULL = dict(
    hidden_size=2048,
    intermediate_size=7168,
    moe_intermediate_size=1792,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_dense_layers=2,
    num_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=128000,
    vocab_size=65536,
    dtype="bfloat16",
)
TINY = dict(
    hidden_size=64,
    intermediate_size=224,
    moe_intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_dense_layers=2,
    num_experts=16,
    num_experts_per_tok=4,
    vocab_size=1024,
    initializer_range=0.02 * (2048 / 64) ** 0.5,  # matmuls gain as much as at full width
    dtype="bfloat16",
)


@contextlib.contextmanager
def stage(name):
    begun = time.monotonic()
    yield
    print(f"{time.monotonic() - begun:7.1f} s  {name}", flush=True)


# ------------------------------------------------------------------------------------------------------- the checkpoint


def shards_of(directory):
    """(name, shape) of all tensors, in the model's order, in lists of about SHARD_BYTES. transformers names them and gives
    their shapes, experts packed."""
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).state_dict()
    shards, held = [[]], 0
    for name, t in shapes.items():
        if name == "lm_head.weight":
            continue  # tied
        if held and held + 2 * t.numel() > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((name, tuple(t.shape)))
        held += 2 * t.numel()
    return shards


def initial(name, shape, spread, bias_spread, seed, device):
    """One tensor as transformers initialises it, but for expert_bias."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    bias = name.endswith("expert_bias")
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    value = torch.empty(shape, dtype=torch.float32 if bias else torch.bfloat16, device=device)
    return value.normal_(0, bias_spread if bias else spread, generator=generator)


def make_checkpoint(directory, config, seed, device, bias_spread=BIAS_SPREAD):
    """Writes the checkpoint unless it is there; the index comes last and says what it was made of."""
    index_file = directory / "model.safetensors.index.json"
    made_of = {"config": config, "seed": seed, "bias_spread": bias_spread, "device": device, "torch": torch.__version__}
    made_of = json.dumps(made_of, sort_keys=True)
    if index_file.exists():
        index = json.loads(index_file.read_text())
        files = {directory / f for f in index["weight_map"].values()}
        if index["metadata"].get("made_of") == made_of and all(f.exists() for f in files):
            return "checkpoint: complete already"
    directory.mkdir(parents=True, exist_ok=True)
    for old in [index_file, *directory.glob("model-*.safetensors"), directory / "golden.safetensors"]:
        old.unlink(missing_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, weight_map, total = shards_of(directory), {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        packed = {n: initial(n, shape, config["initializer_range"], bias_spread, seed, device).cpu() for n, shape in shard}
        tensors = {n: t.contiguous() for n, t in unpack(packed).items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total, "made_of": made_of}, "weight_map": weight_map}
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    return f"checkpoint: {total / 1e9:.1f} GB in {len(shards)} files"


# ------------------------------------------------------------------------------------------------------------- the truth


@dataclass
class Prompt:
    ids: list
    logits: torch.Tensor  # [length, vocab], on the CPU
    experts: torch.Tensor  # [moe layers, length, k]
    scores: torch.Tensor  # [moe layers, length, experts], with the bias
    new: list
    margin: list  # of each new token: best logit minus second
    routing: list  # of each position but the last: last expert chosen minus first not, the least over layers


def routing_margins(seen, k):
    """Of each position of one forward: score of the last expert chosen minus that of the first not chosen, the least of all
    layers."""
    top = torch.stack([biased for _, biased, _ in seen]).topk(k + 1).values
    return (top[..., k - 1] - top[..., k]).amin(0).tolist()


@torch.no_grad()
def find_truth(model, prompts):
    k, out = model.config.num_experts_per_tok, []
    with watch_routers(model) as seen:
        caches = []
        for ids in prompts:
            seen.clear()
            result = model(torch.tensor([ids], device=model.device), use_cache=True)
            assert torch.isfinite(result.logits).all(), "the truth is not finite"
            experts = torch.stack([selected for _, _, selected in seen]).int().cpu()
            scores = torch.stack([biased for _, biased, _ in seen]).cpu()
            out.append(Prompt(ids, result.logits[0].cpu(), experts, scores, [], [], routing_margins(seen, k)))
            caches.append(result.past_key_values)
        # For a single row, batched_mm is the same arithmetic without a loop over experts.
        model.set_experts_implementation("batched_mm")
        for p, cache in zip(out, caches):
            logits = p.logits[-1]
            while True:
                best = logits.topk(2)
                p.new.append(best.indices[0].item())
                p.margin.append((best.values[0] - best.values[1]).item())
                if len(p.new) == NEW_TOKENS:
                    break
                seen.clear()
                step = torch.tensor([p.new[-1:]], device=model.device)
                logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
                p.routing += routing_margins(seen, k)
    return out


# ------------------------------------------------------------------------------------------------- transformers' own error


@contextlib.contextmanager
def force_routers(model):
    """Yields (force, seen): forwards take the experts of `force`, [moe layers, tokens, k], and add the biased routing scores
    [tokens, experts] of each layer to `seen`. The router's own code makes the choice and the weights; it is only given a
    bias that lifts the experts wanted above all others, in their order."""
    force, seen, hooks = [], [], []
    gates = [layer.feed_forward for layer in model.model.layers if hasattr(layer.feed_forward, "gate")]
    for i, block in enumerate(gates):
        assert block.use_expert_bias, "forcing needs use_expert_bias"

        def lift(gate, inputs, i=i):
            hidden, bias = inputs
            chosen = force[i].to(hidden.device, torch.int64)
            steps = 100.0 * torch.arange(gate.top_k, 0, -1, device=hidden.device).expand(chosen.shape)
            return hidden, bias.float() + torch.zeros(len(chosen), len(bias), device=hidden.device).scatter(1, chosen, steps)

        def check(_gate, _inputs, output, block=block, i=i):
            router_logits, _, selected = output
            assert torch.equal(selected.cpu(), force[i].long()), "a router did not take the experts forced"
            seen.append((router_logits.sigmoid() + block.expert_bias).float().cpu())

        hooks += [block.gate.register_forward_pre_hook(lift), block.gate.register_forward_hook(check)]
    try:
        yield force, seen
    finally:
        for h in hooks:
            h.remove()


def own_error(model, truth):
    """Error of a model with forced experts, over all prompts."""
    try:
        return forced_error(model, truth)
    except RuntimeError as e:  # torch's grouped kernels want aligned rows
        print(f"grouped_mm cannot run here, eager instead: {str(e).splitlines()[0][:100]}", file=sys.stderr)
        model.set_experts_implementation("eager")
        return forced_error(model, truth)


@torch.no_grad()
def forced_error(model, truth):
    distance, norm, largest, routing = 0.0, 0.0, [], []
    with force_routers(model) as (force, seen):
        for p in truth:
            force[:] = p.experts
            seen.clear()
            want = p.logits.to(model.device)
            difference = logits_of(model, p.ids).float() - want
            distance += difference.double().pow(2).sum().item()
            norm += want.double().pow(2).sum().item()
            largest.append(difference.abs().max().item())
            routing.append((torch.stack(seen) - p.scores).abs().max().item())
    # np.max, unlike max, hands on a NaN.
    return {
        "error": (distance / norm) ** 0.5,
        "largest": float(np.max(largest)),
        "routing": float(np.max(routing)),
        "experts": model.config._experts_implementation,
    }


@torch.no_grad()
def own_agreement(model, truth):
    """Greedy tokens, with nothing forced, that agree with the truth, up to the first of each sequence that does not."""
    agree, prefill = 0, model.config._experts_implementation
    for p in truth:
        model.set_experts_implementation(prefill)
        out = model(torch.tensor([p.ids], device=model.device), use_cache=True)
        model.set_experts_implementation("batched_mm")
        for n, token in enumerate(p.new, 1):
            if out.logits[0, -1].argmax().item() != token:
                break
            agree += 1
            if n < NEW_TOKENS:
                step = torch.tensor([[token]], device=model.device)
                out = model(step, past_key_values=out.past_key_values, use_cache=True)
    return agree


def free(device):
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def make_golden(directory, device, seed, vocab, golden, about):
    with stage("transformers: load in f32"):
        model = load(directory, device=device)
    prompts = [rng("compare_8b", seed, n).integers(0, vocab, length).tolist() for n, length in enumerate(LENGTHS)]
    with stage(f"transformers: the truth of {len(prompts)} prompts, {sum(LENGTHS)} positions, and {NEW_TOKENS} new tokens each"):
        truth = find_truth(model, prompts)
    own = {}
    for dtype in FORCED:
        if dtype != "f32":
            with stage(f"transformers: load in {dtype}"):
                model = load(directory, "sdpa", "grouped_mm", TORCH_DTYPE[dtype.upper()], device)
        model.set_attn_implementation("sdpa")
        model.set_experts_implementation("grouped_mm")
        with stage(f"transformers: own error in {dtype}"):
            own[dtype] = own_error(model, truth)
        if dtype in FREE and dtype != "f32":
            with stage(f"transformers: own new tokens in {dtype}"):
                own[dtype]["agree"] = own_agreement(model, truth)
        del model
        free(device)
    with stage("golden file"):
        tensors = {}
        for n, p in enumerate(truth):
            tensors[f"ids.{n}"] = torch.tensor(p.ids, dtype=torch.int32)
            tensors[f"logits.{n}"] = p.logits.contiguous()
            tensors[f"greedy.{n}"] = torch.tensor(p.new, dtype=torch.int32)
            tensors[f"experts.{n}"] = p.experts.contiguous()
            tensors[f"margin.{n}"] = torch.tensor(p.margin)
            tensors[f"routing.{n}"] = torch.tensor(p.routing)
        partial = golden.with_suffix(".partial")
        save_file(tensors, partial, metadata={"about": about, "own": json.dumps(own)})
        partial.rename(golden)


@dataclass
class Golden:
    ids: list
    norm: float  # of all logits of the prompt
    new: np.ndarray
    margin: np.ndarray
    routing: np.ndarray


def read_golden(golden):
    """What transformers computed, without the logits, and its own errors."""
    with safe_open(golden, "np") as f:
        get = f.get_tensor
        prompts = [
            Golden(
                get(f"ids.{n}").tolist(),
                float(np.linalg.norm(get(f"logits.{n}").astype(np.float64))),
                get(f"greedy.{n}"),
                get(f"margin.{n}"),
                get(f"routing.{n}"),
            )
            for n in range(len(LENGTHS))
        ]
        return prompts, json.loads(f.metadata()["own"])


def is_made_of(golden, about):
    if not golden.exists():
        return False
    with safe_open(golden, "np") as f:
        return (f.metadata() or {}).get("about") == about


# ----------------------------------------------------------------------------------------------------------------- lfm2c


def lfm2c(arguments, accept=(0,)):
    """Standard output, and seconds."""
    begun = time.monotonic()
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode not in accept:
        short = " ".join(str(a)[:60] for a in arguments[:40])
        sys.exit(f"{short}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout, time.monotonic() - begun


def verify(arguments, truth):
    """Error of a plan with forced experts, over all prompts, from the table that `lfm2c verify` prints for each."""
    # Exit code 1 says that a prompt is beyond the tolerance; the table is there all the same.
    text, seconds = lfm2c([*arguments, "--tolerance", 1], accept=(0, 1))
    rows = [line.split() for line in text.splitlines()]
    rows = {int(r[0]): r for r in rows if len(r) == 6 and r[0].isdigit()}
    if sorted(rows) != list(range(len(truth))) or any(int(rows[n][1]) != len(p.ids) for n, p in enumerate(truth)):
        sys.exit(f"lfm2c verify: expected a row for each of {len(truth)} prompts, found\n{text}")
    norms = np.array([p.norm for p in truth])
    errors, largest = (np.array([float(rows[n][c]) for n in range(len(truth))]) for c in (2, 3))
    return {
        "error": float(np.linalg.norm(errors * norms) / np.linalg.norm(norms)),
        "largest": float(np.max(largest)),
        "seconds": seconds,
    }


def run_free(arguments, truth):
    for p in truth:
        arguments = [*arguments, "--tokens", ",".join(map(str, p.ids))]
    text, seconds = lfm2c([*arguments, "--max-new-tokens", NEW_TOKENS, "--ignore-eos", "--format", "json"])
    sequences = json.loads(text)["sequences"]
    new = [np.array(s.get("tokens", [])) for s in sequences]
    if [len(n) for n in new] != [NEW_TOKENS] * len(truth):
        sys.exit(f"lfm2c run: expected {len(truth)} sequences of {NEW_TOKENS} new tokens, found {text[:2000]}")
    return new, seconds


@dataclass
class Difference:
    prompt: int
    length: int
    at: int  # first new token that differs
    margin: float  # the truth's, there
    routing: float  # the least there and before
    excused: bool


def compare_tokens(truth, found, logit_limit, routing_limit):
    """(tokens that agree, tokens that must agree, the first difference of each sequence)"""
    agree, must, differences = 0, 0, []
    for n, (p, new) in enumerate(zip(truth, found)):
        # Logits of new token j are those of position length - 1 + j, which sees the experts of all positions up to there.
        routing = np.minimum.accumulate(p.routing)[len(p.ids) - 1 :]
        close = ~((p.margin >= logit_limit) & (routing >= routing_limit))
        must += int(np.argmax(close)) if close.any() else NEW_TOKENS
        differ = np.flatnonzero(new != p.new)
        agree += int(differ[0]) if len(differ) else NEW_TOKENS
        if len(differ):
            at = int(differ[0])
            differences.append(Difference(n, len(p.ids), at, float(p.margin[at]), float(routing[at]), bool(close[at])))
    return agree, must, differences


# ---------------------------------------------------------------------------------------------------------------- report


def line(*columns):
    widths = (16, 11, 11, 11, 11, 11, 9, 24)
    print("".join(f"{c!s:>{w}}" if i else f"{c!s:{w}}" for i, (c, w) in enumerate(zip(columns, widths))) + f"  {columns[-1]}")


def verdict(holds):
    return "ok" if holds else "FAILED"


def report(own, forced, tokens):
    """Prints the table; true if all criteria hold. Every comparison is written so that NaN fails."""
    everything = True
    print()
    line("forced experts", "relative L2", "largest", "HF error", "HF largest", "HF routing", "seconds", "criterion", "")
    for dtype, e in forced.items():
        o = own[dtype]
        if dtype == "f32":
            holds = e["error"] <= F32_ERROR and e["largest"] <= F32_LARGEST
            criterion = f"<= {F32_ERROR:g}, <= {F32_LARGEST:g}"
        else:
            holds = e["error"] <= OWN_FACTOR * o["error"]
            criterion = f"{e['error'] / o['error']:.3f} x HF <= {OWN_FACTOR:g}"
        everything &= holds
        numbers = [f"{x:.2e}" for x in (e["error"], e["largest"], o["error"], o["largest"], o["routing"])]
        line(dtype, *numbers, f"{e['seconds']:.1f}", criterion, verdict(holds))
    print()
    line("free running", "agree", "HF agree", "must agree", "logits <", "routing <", "seconds", "criterion", "")
    for dtype, t in tokens.items():
        without = sum(not d.excused for d in t["differences"])
        holds = without == 0 and (dtype != "f32" or t["must"] > 0)
        everything &= holds
        limits = [f"{t[x]:.1e}" for x in ("logit_limit", "routing_limit")]
        agree = f"{t['agree']}/{t['of']}"
        criterion = f"{len(t['differences'])} differ, {without} no excuse"
        line(dtype, agree, own[dtype].get("agree", "-"), t["must"], *limits, f"{t['seconds']:.1f}", criterion, verdict(holds))
    for dtype, t in tokens.items():
        for d in t["differences"]:
            print(
                f"  {dtype}: prompt {d.prompt} ({d.length} tokens) differs first at new token {d.at}: margin there {d.margin:.1e},"
                f" least routing margin up to there {d.routing:.1e}: {'excused' if d.excused else 'NO EXCUSE'}"
            )
    return everything


def parse_set(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("expected KEY=JSON")
    return key, json.loads(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lfm2c", type=Path, required=True, help="the lfm2c to test")
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoint is, or will be; outside the repository")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="what both sides run on (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a small shape of the same family, for a machine without a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (0)")
    parser.add_argument("--set", type=parse_set, action="append", default=[], metavar="KEY=JSON", help="another config value")
    parser.add_argument("--lfm2c-model", type=Path, help="lfm2c reads this directory instead: with a bug planted, this must fail")
    args = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        sys.exit(f"the oracle is transformers {TRANSFORMERS}, not {transformers.__version__}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cpu":
        torch.set_num_threads(1)  # for tiny models, more only get in each other's way
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    begun = time.monotonic()
    pattern = "ccacacca" if args.tiny else "ccacccacccacccacccaccacc"
    config = moe(pattern, **{**(TINY if args.tiny else FULL), **dict(args.set)})
    with stage("checkpoint"):
        print(make_checkpoint(args.dir, config, args.seed, args.device))
    model = args.lfm2c_model or args.dir
    plans = args.dir / "plans"
    plans.mkdir(exist_ok=True)

    def compile_plan(dtype, forced):
        plan = plans / f"{dtype}-{'forced' if forced else 'free'}.plan"
        target = "cpu" if args.device == "cpu" else "sm_90a"
        options = ["--dtype", dtype, "--target", target, *BUCKETS, *["--forced-routing"] * forced]
        _, seconds = lfm2c([args.lfm2c, "compile", "--model", model, *options, "-o", plan])
        print(f"{seconds:7.1f} s  lfm2c: compile {plan.name}", flush=True)
        return plan

    # Compiling needs no GPU, so it goes on beside transformers.
    with ThreadPoolExecutor(1) as pool:
        futures = {(d, f): pool.submit(compile_plan, d, f) for f, ds in ((True, FORCED), (False, FREE)) for d in ds}
        golden = args.dir / "golden.safetensors"
        about = json.dumps(
            {
                "config": config,
                "seed": args.seed,
                "lengths": LENGTHS,
                "new_tokens": NEW_TOKENS,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
                "torch": torch.__version__,
                "transformers": TRANSFORMERS,
            },
            sort_keys=True,
        )
        if is_made_of(golden, about):
            print("golden file: complete already")
        else:
            make_golden(args.dir, args.device, args.seed, config["vocab_size"], golden, about)
        truth, own = read_golden(golden)
        compiled = {key: future.result() for key, future in futures.items()}

    common = ["--model", model, "--device", args.device]
    forced, tokens = {}, {}
    for dtype in FORCED:
        with stage(f"lfm2c: verify {dtype}"):
            forced[dtype] = verify([args.lfm2c, "verify", compiled[dtype, True], *common, "--golden", golden], truth)
    for dtype in FREE:
        with stage(f"lfm2c: run {dtype}"):
            new, seconds = run_free([args.lfm2c, "run", compiled[dtype, False], *common], truth)
        logit_limit = MARGIN_FACTOR * forced[dtype]["largest"]
        scale = max(1.0, forced[dtype]["largest"] / own[dtype]["largest"])
        routing_limit = MARGIN_FACTOR * own[dtype]["routing"] * scale
        agree, must, differences = compare_tokens(truth, new, logit_limit, routing_limit)
        tokens[dtype] = {
            "agree": agree,
            "of": NEW_TOKENS * len(truth),
            "must": must,
            "differences": differences,
            "logit_limit": logit_limit,
            "routing_limit": routing_limit,
            "seconds": seconds,
        }
    everything = report(own, forced, tokens)
    distinct = np.mean([len(set(p.new.tolist())) for p in truth])
    implementations = ", ".join(f"{dtype} sdpa and {o['experts']}" for dtype, o in own.items())
    print(f"\nHF: {implementations}; {distinct:.0f} distinct tokens of {NEW_TOKENS} on average")
    print(f"{verdict(everything)}: {time.monotonic() - begun:.0f} s in all")
    sys.exit(int(not everything))


if __name__ == "__main__":
    main()
