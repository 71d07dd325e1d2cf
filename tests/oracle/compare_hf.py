#!/usr/bin/env python3
"""Logits of a checkpoint directory from Hugging Face transformers, for comparing by hand with `lfm2c run --prompt-logits`.

    .venv/bin/python tests/oracle/compare_hf.py DIR --tokens 5,17,3 --out hf.npy [--dtype float32] [--new-tokens 16]

Writes float32 NPY [prompt length, vocab], and prints the greedy continuation when --new-tokens is given. Install: see
make_goldens.py. With --against FILE.npy it also prints the relative L2 error of that file and exits 1 above --tolerance.
"""

import argparse
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", required=True, type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", help="where to write the logits (.npy)")
    parser.add_argument("--new-tokens", type=int, default=0)
    parser.add_argument("--against", help="logits to compare with (.npy)")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        args.directory,
        dtype=getattr(torch, args.dtype),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    out = model(torch.tensor([args.tokens]), use_cache=True)
    logits = out.logits[0].float().numpy()
    if args.out:
        np.save(args.out, logits)
    new = []
    for _ in range(args.new_tokens):
        new.append(out.logits[0, -1].argmax().item())
        out = model(torch.tensor([new[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    if new:
        print(",".join(map(str, new)))
    if args.against:
        other = np.load(args.against).astype(np.float64)
        error = np.linalg.norm(other - logits) / np.linalg.norm(logits)
        print(f"relative L2 {error:.2e}", file=sys.stderr)
        sys.exit(int(not error <= args.tolerance))


if __name__ == "__main__":
    main()
