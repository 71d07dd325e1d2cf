#!/usr/bin/env python3
"""Compare the perplexity that `lfm2c eval` prints with one that transformers computes on the same chunks of the same text.

    python tests/oracle/perplexity_hf.py --lfm2c target/release/lfm2c --model models/demo --text held-out.txt

The reference is float32 on the CPU, with log-softmax in float64. Chunks are those of `lfm2c eval --help`: of --context tokens,
the first replaced by the beginning-of-sequence token, and scored from the middle on. lfm2c runs plans of every type in --dtype;
a line for each says how far it is from the reference. Exits with 1 if f32 differs by more than --tolerance, relative, or
another type by more than --tolerance-narrow. Install as make_goldens.py says.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def chunks(tokenizer, text, context, most):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode("", add_special_tokens=True)[:1]
    tokens = before + tokens
    cut = [tokens[at : at + context] for at in range(0, len(tokens) - context + 1, context)]
    return [before + chunk[len(before) :] for chunk in cut][:most]


@torch.inference_mode()
def reference(arguments, text):
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    first = 0 if arguments.all else arguments.context // 2
    surprises = []
    for chunk in chunks(tokenizer, text, arguments.context, arguments.chunks):
        logits = model(torch.tensor([chunk]), use_cache=False).logits[0, first:-1].double()
        following = torch.tensor(chunk[first + 1 :])
        surprises.append(-logits.log_softmax(-1).gather(1, following[:, None])[:, 0])
    if not surprises:
        sys.exit(f"{arguments.text}: expected at least a chunk of {arguments.context} tokens")
    surprises = torch.cat(surprises)
    mean, count = surprises.mean().item(), len(surprises)
    error = surprises.std(unbiased=True).item() / math.sqrt(count)
    return math.exp(mean), math.exp(mean) * error, count


def ours(arguments, dtype, folder):
    plan = folder / f"{dtype}.plan"
    sizes = ["--max-context", arguments.context, "--max-sequences", 4, "--kv-tokens", 4 * (arguments.context + 256)]
    buckets = ["--prefill", "16,512", "--decode", "1,4"]
    compile = [arguments.lfm2c, "compile", "--model", arguments.model, "--dtype", dtype, *sizes, *buckets, "-o", plan]
    subprocess.run([str(word) for word in compile], check=True, stdout=subprocess.DEVNULL)
    options = ["--all"] if arguments.all else []
    options += ["--chunks", arguments.chunks] if arguments.chunks else []
    named = ["--model", arguments.model, "--text", arguments.text, "--context", arguments.context]
    call = [arguments.lfm2c, "eval", plan, *named, *options, "--format", "json"]
    return json.loads(subprocess.run([str(word) for word in call], check=True, stdout=subprocess.PIPE).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lfm2c", type=Path, required=True, help="the binary")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory with a tokenizer")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="only the first N chunks")
    parser.add_argument("--all", action="store_true", help="score every token but a chunk's first")
    parser.add_argument("--dtype", default="f32,bf16")
    parser.add_argument("--tolerance", type=float, default=5e-5)
    parser.add_argument("--tolerance-narrow", type=float, default=3e-3)
    arguments = parser.parse_args()
    text = arguments.text.read_bytes().decode("utf-8")
    perplexity, error, count = reference(arguments, text)
    print(f"transformers f32   {perplexity:.6f} +/- {error:.6f}   {count} scored tokens")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtype.split(","):
            found = ours(arguments, dtype, Path(folder))
            relative = found["perplexity"] / perplexity - 1
            tolerance = arguments.tolerance if dtype == "f32" else arguments.tolerance_narrow
            good = abs(relative) <= tolerance and found["scored_tokens"] == count
            failed |= not good
            print(
                f"lfm2c {dtype:<12} {found['perplexity']:.6f} +/- {found['standard_error']:.6f}   "
                f"{found['scored_tokens']} scored tokens   {relative:+.2e} (<= {tolerance:g})  {'ok' if good else 'FAILED'}"
            )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
