#!/usr/bin/env python3
"""Time the matrix products of an lfm2c plan beside cuBLAS's on the same shapes, on one GPU, in one run.

    python3 tests/oracle/bench_products.py --lfm2c target/release/lfm2c                        # bf16: 512, 2048 and 8192 rows
    python3 tests/oracle/bench_products.py --lfm2c target/release/lfm2c --dtype f32 --f32 split
    python3 tests/oracle/bench_products.py --lfm2c target/release/lfm2c --libraries cublaslt   # steps by it where the lock says so

lfm2c: the steps of that shape of all layers, by `bench --block moe,dense`: dense products as a graph of their own, experts' as what they add to
a graph of their blocks; with the step's whole epilogue, and for experts with the gather of their rows. cuBLAS: the bare product by
torch (`linear`; in f32 without TF32), experts' by `_grouped_mm` over groups of equal size, without gather or epilogue. It goes
through as many copies of the weight as the second cache cannot hold, as a graph. Medians of twenty replays count.
"""

import argparse
import json
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


def measure(args, rows):
    """The machine, and the products of a bucket of prefill: their kernels, time of one in microseconds, and operations of one."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "products.plan"
        how = ["--synthetic", 1, "--dtype", args.dtype, *(["--f32", args.f32] if args.dtype == "f32" else [])]
        how += ["--libraries", args.libraries] if args.libraries else []
        run(args.lfm2c, "compile", args.recipe, "--target", "sm_90a", *how, "--decode", "1", "--prefill", rows, "-o", plan)
        sizes = ["--prefill", rows, "--steps", REPLAYS]
        found = json.loads(run(args.lfm2c, "bench", plan, "--block", "moe,dense", *sizes, "--format", "json"))
    stages = [(block["block"] == "Experts", stage) for block in found["blocks"] for stage in block["stages"]]
    return found["machine"], [
        (experts, ", ".join(s["kernels"]), 1e3 * s["added_ms"] / s["steps"], s["work"]["flops"] / s["steps"])
        for experts, s in stages
    ]


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {result.returncode}\n{result.stderr}")
    return result.stdout


def product_of(products, flops, experts):
    """The product of so many operations: an epilogue adds few to them."""
    return next((p for p in products if p[0] == experts and flops <= p[3] <= 1.02 * flops), None)


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
    parser.add_argument("--libraries", choices=["cublaslt"], help="compile with --libraries: the lock chooses which steps are its calls")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    header = f"{'product':24} {'rows':>5} {'shape':>20} {'lfm2c, us':>10} {'TFLOP/s':>8} {'cuBLAS, us':>11} {'TFLOP/s':>8} {'times':>6}  kernel"
    missing = 0
    for rows in args.rows:
        machine, products = measure(args, rows)
        if rows == args.rows[0]:
            what = args.dtype if args.dtype != "f32" else f"f32 ({args.f32})"
            what += f", with {args.libraries}" if args.libraries else ""
            print(f"{machine['device']}, torch {torch.__version__}, CUDA {torch.version.cuda}; {what}\n\n{header}")
        for name, columns, depth, experts in shapes(FULL):
            groups = FULL["num_experts"] if experts else 1
            met = rows * (FULL["num_experts_per_tok"] if experts else 1)
            flops = 2 * met * columns * depth
            found = product_of(products, flops, experts)
            if found is None:
                print(f"{name:24} {rows:5} no step of {flops} operations")
                missing += 1
                continue
            _, kernels, ours, _ = found
            theirs = cublas_us(met, columns, depth, groups, DTYPES[args.dtype])
            speed = lambda us: "-" if us is None else f"{flops / us / 1e6:.1f}"
            shown = "-" if theirs is None else f"{theirs:.1f}"
            ratio = "-" if theirs is None else f"{theirs / ours:.2f}"
            shape = f"{met} x {columns} x {depth}"
            times = f"{ours:10.1f} {speed(ours):>8} {shown:>11} {speed(theirs):>8} {ratio:>6}"
            print(f"{name:24} {rows:5} {shape:>20} {times}  {kernels}")
            torch.cuda.empty_cache()
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
