#!/usr/bin/env python3
"""Time the matrix products of an lfm2c plan beside cuBLAS's on the same shapes, on one GPU, in one run.

    python3 tests/oracle/bench_products.py --lfm2c target/release/lfm2c                        # bf16: 512, 2048 and 8192 rows
    python3 tests/oracle/bench_products.py --lfm2c target/release/lfm2c --dtype f32 --f32 split

lfm2c: medians over a bucket's steps of that shape, by `profile`: what a step adds to the graph of all steps before it, and beside it its
time alone, less what a mark takes; with the step's whole epilogue, and for experts with the gather of their rows. cuBLAS: the bare product by torch (`linear`; in f32 without TF32), experts'
by `_grouped_mm` over groups of equal size, without gather or epilogue. It goes through as many copies of the weight as the second
cache cannot hold, as a graph; the median of twenty replays counts.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from compare_8b import FULL

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Bytes of weights that one replay reads: several times the second cache.
WEIGHTS = 400e6
REPLAYS = 20


def shapes(config):
    """Columns and depth of each kind of product, by what it is called, and of experts."""
    hidden, dense, expert = config["hidden_size"], config["intermediate_size"], config["moe_intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = hidden // heads
    return [
        ("convolution's in_proj", 3 * hidden, hidden, False),
        ("attention's q, k and v", (heads + 2 * kv_heads) * head, hidden, False),
        ("out_proj", hidden, hidden, False),
        ("dense gate and up", 2 * dense, hidden, False),
        ("dense down", hidden, dense, False),
        ("experts' gate and up", 2 * expert, hidden, True),
        ("experts' down", hidden, expert, True),
    ]


def profile(args, rows):
    """The steps of a bucket of prefill: name, kernel, times in the graph and alone in microseconds, and operations."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "products.plan"
        how = ["--synthetic", 1, "--dtype", args.dtype, *(["--f32", args.f32] if args.dtype == "f32" else [])]
        sizes = ["--decode", "1", "--prefill", rows]
        run(args.lfm2c, "compile", args.recipe, "--target", "sm_90a", *how, *sizes, "-o", plan)
        found = json.loads(run(args.lfm2c, "profile", plan, "--bucket", f"prefill_{rows}", "--format", "json"))
    mark = found["profile"]["mark_us"]
    steps = found["profile"]["steps"]
    return found["machine"], [
        (s["name"], s["kernel"], s["in_graph_us"], s["us"] - mark, s["work"]["flops"]) for s in steps
    ]


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {result.returncode}\n{result.stderr}")
    return result.stdout


def steps_of(steps, flops, experts):
    """The products of so many operations: an epilogue adds few to them."""
    is_product = lambda name: re.search(r"\b(matmul|expert|grouped_matmul)\b", name)
    of_experts = lambda name: "expert" in name or "grouped" in name
    wanted = [s for s in steps if is_product(s[0]) and of_experts(s[0]) == experts]
    return [s for s in wanted if flops <= s[4] <= 1.02 * flops]


def replay_us(work, count):
    """Median time of one of `count` calls that are captured together, in microseconds."""
    for i in range(count):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return statistics.median(times[3:])


def cublas_us(rows, columns, depth, groups, dtype):
    """Time of the bare product of random numbers, or why there is none."""
    size = groups * columns * depth * dtype.itemsize
    copies = max(2, round(WEIGHTS / size))
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)
    x = normal(rows, depth)
    try:
        if groups == 1:
            weights = [normal(columns, depth) * depth**-0.5 for _ in range(copies)]
            return replay_us(lambda i: torch.nn.functional.linear(x, weights[i]), copies)
        weights = [normal(groups, columns, depth) * depth**-0.5 for _ in range(copies)]
        ends = torch.arange(1, groups + 1, device="cuda", dtype=torch.int32) * (rows // groups)
        return replay_us(lambda i: torch._grouped_mm(x, weights[i].transpose(1, 2), offs=ends), copies)
    except RuntimeError as error:
        print(f"  cuBLAS not run: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lfm2c", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=Path("plans/lfm2-8b-a1b.ron"), help="of the shape of LFM2-8B-A1B")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[512, 2048, 8192])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--f32", choices=["exact", "split"], default="exact")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    header = f"{'product':24} {'rows':>5} {'shape':>20} {'lfm2c, us':>10} {'alone':>7} {'TFLOP/s':>8} {'cuBLAS, us':>11} {'TFLOP/s':>8} {'times':>6}  kernel"
    missing = 0
    for rows in args.rows:
        machine, steps = profile(args, rows)
        if rows == args.rows[0]:
            what = args.dtype if args.dtype != "f32" else f"f32 ({args.f32})"
            print(f"{machine['device']}, torch {torch.__version__}, CUDA {torch.version.cuda}; {what}\n\n{header}")
        for name, columns, depth, experts in shapes(FULL):
            groups = FULL["num_experts"] if experts else 1
            met = rows * (FULL["num_experts_per_tok"] if experts else 1)
            flops = 2 * met * columns * depth
            found = steps_of(steps, flops, experts)
            if not found:
                print(f"{name:24} {rows:5} no step of {flops} operations")
                missing += 1
                continue
            ours, alone = (statistics.median(s[i] for s in found) for i in (2, 3))
            theirs = cublas_us(met, columns, depth, groups, DTYPES[args.dtype])
            speed = lambda us: "-" if us is None else f"{flops / us / 1e6:.1f}"
            shown = "-" if theirs is None else f"{theirs:.1f}"
            ratio = "-" if theirs is None else f"{theirs / ours:.2f}"
            shape = f"{met} x {columns} x {depth}"
            kernels = ", ".join(sorted({s[1] for s in found}))
            times = f"{ours:10.1f} {alone:7.1f} {speed(ours):>8} {shown:>11} {speed(theirs):>8} {ratio:>6}"
            print(f"{name:24} {rows:5} {shape:>20} {times}  {kernels}")
            torch.cuda.empty_cache()
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
