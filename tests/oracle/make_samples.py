#!/usr/bin/env python3
"""Samples and their answers for `lfm2c run --input inputs.bin --validate answers.bin`, computed by Hugging Face transformers.

    .venv/bin/python tests/oracle/make_samples.py DIR --count 64 --length 32 --inputs inputs.bin --answers answers.bin
    .venv/bin/python tests/oracle/make_samples.py DIR --given --inputs inputs.bin --answers answers.bin

The first draws random tokens from --seed and writes both files; the second answers samples that are there, such as those of
`lfm2c samples`. Both files are little-endian:

    inputs      int32 count, int32 length, int32 tokens [count, length]
    answers     float32 logits [count, vocab], those of each sample's last position

The model runs in float32 on the CPU, experts and attention in their eager form. Install: see make_goldens.py.
"""

import argparse
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def read(path, vocab):
    words = np.fromfile(path, dtype="<i4")
    if len(words) < 2 or len(words) != 2 + int(words[0]) * int(words[1]):
        sys.exit(f"{path}: expected int32 count, int32 length, and count x length tokens, found {len(words)} int32")
    tokens = words[2:].reshape(words[0], words[1])
    if tokens.min() < 0 or tokens.max() >= vocab:
        sys.exit(f"{path}: expected tokens from 0 to {vocab - 1}, found {tokens.min()} to {tokens.max()}")
    return tokens


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--given", action="store_true", help="answer the samples that are there")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="samples at a time")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        args.directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    vocab = model.config.vocab_size
    if args.given:
        tokens = read(args.inputs, vocab)
    else:
        if args.count < 1 or args.length < 1:
            parser.error("--count and --length: expected at least 1")
        tokens = np.random.default_rng(args.seed).integers(0, vocab, (args.count, args.length), dtype=np.int32)
        np.concatenate([np.array(tokens.shape, dtype="<i4"), tokens.ravel().astype("<i4")]).tofile(args.inputs)
    with open(args.answers, "wb") as answers:
        for start in range(0, len(tokens), args.batch):
            ids = torch.from_numpy(tokens[start : start + args.batch].astype(np.int64))
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            answers.write(logits.numpy().astype("<f4").tobytes())
    print(f"{len(tokens)} samples of {tokens.shape[1]} tokens, {vocab} logits each", file=sys.stderr)


if __name__ == "__main__":
    main()
