#!/usr/bin/env python3
"""Time lfm2c beside Hugging Face transformers at the shape of LFM2-8B-A1B, on one GPU, in one run, from the same files.

    python3 tests/oracle/bench_peers.py --lfm2c target/release/lfm2c --dir /tmp/peers                   # on an H200
    .venv/bin/python tests/oracle/bench_peers.py --lfm2c target/release/lfm2c --dir /tmp/tiny --tiny   # shows that it works

DIR holds a checkpoint made as compare_8b.py makes it, but with transformers' own expert_bias of 0, so that all experts are as
likely; it is made if it is not there. Two tables:

    decode    sequences of random tokens, so many positions behind each, one token each a step. transformers: a static cache
              and the whole forward with the choice of tokens compiled by torch.compile(mode="reduce-overhead"), which is CUDA
              graphs, with each implementation of experts that it has for this; the best of them counts. lfm2c: `bench`,
              whose step begins with one step's tokens on the host and ends with the next one's.
    prefill   one prompt of so many rows, to its first token: transformers with sdpa and grouped_mm, not compiled.

Times are medians by the host's clock, in milliseconds. With --cold, also from the start of a process to the first token of
a prompt of three tokens, the files in the page cache.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no kernels from the hub: they are other implementations

import torch
import transformers
from compare_8b import FULL, TINY, make_checkpoint
from make_goldens import load, moe
from transformers import StaticCache

EXPERTS = ["grouped_mm", "batched_mm"]


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def timed(work, runs, device):
    """Median time of runs, in milliseconds, after three that do not count."""
    samples = []
    for run in range(3 + runs):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        if run >= 3:
            samples.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(samples)


def random_tokens(config, rows, columns, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config["vocab_size"], (rows, columns), generator=generator).to(device)


@torch.no_grad()
def decode(model, config, sequences, experts, args):
    """A step of transformers: forward and choice, compiled, over a static cache. Prompts go by the implementation whose memory does
    not grow with their rows times the experts' size."""
    device = args.device
    cache = StaticCache(config=model.config, max_cache_len=args.context + args.steps + 16)
    prompt = random_tokens(config, sequences, args.context, device)
    model.set_experts_implementation(EXPERTS[0])
    token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    model.set_experts_implementation(experts)

    def step(token, position):
        out = model(token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    if args.compile:
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    state = {"token": token, "at": args.context}

    def one():
        position = torch.full((sequences, 1), state["at"], device=device)
        # Copied, because the graph's own output is overwritten by its next replay; read, as a caller would.
        state["token"] = step(state["token"], position).clone()
        state["token"].cpu()
        state["at"] += 1

    return timed(one, args.steps, device)


@torch.no_grad()
def prefill(model, config, rows, args):
    prompt = random_tokens(config, 1, rows, args.device)
    return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1).cpu(), 10, args.device)


def free():
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(name, work):
    """The time, or why there is none; on standard error what is under way, because compiling takes minutes."""
    begun = time.perf_counter()
    try:
        found = work()
        print(f"  {name}: {found:.3f} ms, found in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        return found
    except Exception as error:  # an implementation that this version or device does not have
        print(f"  {name}: not run: {type(error).__name__}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return None
    finally:
        free()


def run_lfm2c(*arguments):
    """What it printed. `bench` says by its exit code that rows routed alike, when all is measured: that is passed on."""
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if result.returncode and result.stdout:
        print(result.stderr, file=sys.stderr)
    elif result.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {result.returncode}\n{result.stderr}")
    return result.stdout


def ours(args, plan):
    """The report of `lfm2c bench` by bucket, and the machine."""
    sizes = ["--decode", ",".join(map(str, args.decode)), "--prefill", ",".join(map(str, args.prefill))]
    more = ["--context", args.context, "--steps", args.steps, "--format", "json"]
    report = json.loads(run_lfm2c(args.lfm2c, "bench", plan, "--model", args.dir, *sizes, *more))
    for bucket in report["buckets"]:
        if bucket["name"] != f"{bucket['phase'].lower()}_{bucket['rows']}":
            sys.exit(f"{bucket['name']}: expected as many rows, found {bucket['rows']}; the plan has too little room")
    return {bucket["name"]: bucket for bucket in report["buckets"]}, report["machine"]


def cold(command):
    begun = time.perf_counter()
    run_lfm2c(*command)
    return time.perf_counter() - begun


COLD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cuda", experts_implementation="grouped_mm")
print(model(torch.tensor([[5, 6, 7]], device="cuda"), logits_to_keep=1).logits.argmax(-1).item())
"""


def table(header, rows):
    def cell(value):
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    rows = [header, *[[cell(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths)))
    print()


def ratio(theirs, our):
    return None if theirs is None or our is None else theirs / our


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = lambda text: [int(n) for n in text.split(",") if n]
    parser.add_argument("--lfm2c", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoint is, or will be; outside the repository")
    parser.add_argument("--recipe", type=Path, help="compile this instead of the directory, for its lock file")
    parser.add_argument("--pack", action="store_true", help="compile with --pack: weights of bf16 at 12 bits, too")
    parser.add_argument("--decode", type=sizes, default=[1, 8, 64], metavar="SEQUENCES,...")
    parser.add_argument("--prefill", type=sizes, default=[128, 512, 2048, 8192], metavar="ROWS,...")
    parser.add_argument("--context", type=int, default=256, help="positions behind each sequence (256)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps timed (200)")
    parser.add_argument("--cold", action="store_true", help="also time whole processes to their first token")
    parser.add_argument("--tiny", action="store_true", help="a small shape on the CPU, nothing compiled, lfm2c not timed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    args.compile = not args.tiny
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    config = moe("ccacacca" if args.tiny else "ccacccacccacccacccaccacc", **(TINY if args.tiny else FULL))
    print(make_checkpoint(args.dir, config, args.seed, args.device, bias_spread=0.0))

    if args.tiny:
        args.decode, args.prefill, args.context, args.steps = [1, 2], [16, 64], 16, 5
        found, machine = {}, {"device": "the CPU"}
    else:
        plan = args.dir / "peers.plan"
        # Room for every bucket's rows: with less, a bucket of prompts would be measured with fewer.
        room = max(max(args.decode) * (args.context + args.steps + 128), *args.prefill)
        limits = ["--max-sequences", max(args.decode), "--kv-tokens", room]
        limits += ["--decode", ",".join(map(str, args.decode)), "--prefill", ",".join(map(str, args.prefill))]
        limits += ["--max-context", max(args.context + args.steps + 128, *args.prefill)]
        source = [args.recipe] if args.recipe else ["--model", args.dir]
        limits += ["--pack"] if args.pack else []
        run_lfm2c(args.lfm2c, "compile", *source, "--target", "sm_90a", "--dtype", "bf16", *limits, "-o", plan)
        found, machine = ours(args, plan)
    model = load(args.dir, "sdpa", EXPERTS[0], torch.bfloat16, args.device)
    peers = f"torch {torch.__version__}, transformers {transformers.__version__}"
    packed = ", packed weights" if args.pack else ""
    print(f"{machine['device']}, {peers}, {time.strftime('%Y-%m-%d')}; bf16{packed}, {args.context} positions behind, ms\n")

    rows = []
    for sequences in args.decode:
        theirs = []
        for experts in EXPERTS:
            name = f"transformers, decode {sequences}, {experts}"
            theirs.append(attempt(name, lambda: decode(model, config, sequences, experts, args)))
        report = found.get(f"decode_{sequences}")
        our = report["host"]["median_ms"] if report else None
        best = min((t for t in theirs if t is not None), default=None)
        p99, floor = (report["host"]["p99_ms"], report["floor_ms"]) if report else (None, None)
        rows.append([sequences, floor, *theirs, our, p99, ratio(floor, our), ratio(best, our)])
    compiled = "compiled " if args.compile else ""
    header = ["sequences", "floor", *[f"{compiled}{e}" for e in EXPERTS], "lfm2c", "p99", "of floor", "times as fast"]
    table(header, rows)

    model.set_experts_implementation("grouped_mm")
    rows = []
    for count in args.prefill:
        theirs = attempt(f"transformers, prefill {count}", lambda: prefill(model, config, count, args))
        report = found.get(f"prefill_{count}")
        our, floor = (report["host"]["median_ms"], report["floor_ms"]) if report else (None, None)
        rows.append([count, floor, theirs, our, ratio(floor, our), ratio(theirs, our)])
    table(["rows", "memory floor", "grouped_mm", "lfm2c", "of floor", "times as fast"], rows)

    if args.cold and not args.tiny:
        del model
        free()
        run = [args.lfm2c, "run", plan, "--model", args.dir, "--tokens", "5,6,7", "--max-new-tokens", 1]
        theirs = [cold([sys.executable, "-c", COLD, args.dir]) for _ in range(2)][-1]
        table(["process start to first token, s", "seconds"], [["transformers", theirs], ["lfm2c", [cold(run) for _ in range(2)][-1]]])


if __name__ == "__main__":
    main()
