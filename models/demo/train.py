#!/usr/bin/env python3
"""Trains the demo model of lfm2c: an LFM2-MoE of less than four million parameters.

    train.py --corpus corpus.json --out DIR [--device cuda] [--steps N | --minutes M]
    train.py --corpus corpus.json --out DIR --check      20 small steps on the CPU: shows that it works
    train.py --out DIR --evaluate                        no training: the report on a checkpoint that is there

DIR holds the files of build_tokenizer.py and gets config.json, generation_config.json and model.safetensors in bf16. See README.md.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GenerationConfig, Lfm2MoeConfig, Lfm2MoeForCausalLM

from data import Data
from evaluate import report

HERE = Path(__file__).resolve().parent
LENGTHS = (128, 512)  # tokens of a row
PATTERN = "sslsl"  # which rows a step takes: short or long
EXPERTS, TOP = 8, 2


def config():
    kinds = {"c": "conv", "a": "full_attention"}
    return Lfm2MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=320, moe_intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, layer_types=[kinds[k] for k in "ccacacac"], num_dense_layers=1,
        num_experts=EXPERTS, num_experts_per_tok=TOP, use_expert_bias=True, norm_topk_prob=True, routed_scaling_factor=1.0,
        conv_L_cache=3, conv_bias=False, norm_eps=1e-5, max_position_embeddings=2048, initializer_range=0.03,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=7)


def experts(block, x):
    """The MoE block with all experts computed for all tokens: what is not chosen has weight 0. With eight tiny experts two large
    products are much faster than gathering tokens. Also how many tokens each expert got."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(x.float(), block.gate.weight.float()).sigmoid()
        chosen = torch.zeros_like(scores).scatter(1, (scores.detach() + block.expert_bias).topk(TOP, -1).indices, 1.0)
        weights = scores * chosen
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    gate, up = F.linear(x, block.experts.gate_up_proj.flatten(0, 1)).unflatten(-1, (EXPERTS, 2, -1)).unbind(2)
    inner = F.silu(gate) * up * weights.unsqueeze(-1).to(gate.dtype)
    return F.linear(inner.flatten(1), block.experts.down_proj.transpose(0, 1).flatten(1)).reshape(shape), chosen.sum(0)


def norm(layer, x):
    return F.rms_norm(x.float(), (x.shape[-1],), layer.weight, layer.variance_epsilon)


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def attention(layer, x, cos, sin):
    heads = lambda y: y.unflatten(-1, (-1, layer.head_dim))
    q = rotate(norm(layer.q_layernorm, heads(layer.q_proj(x))).transpose(1, 2), cos, sin)
    k = rotate(norm(layer.k_layernorm, heads(layer.k_proj(x))).transpose(1, 2), cos, sin)
    v = heads(layer.v_proj(x)).transpose(1, 2)
    k, v = (y.repeat_interleave(layer.num_key_value_groups, 1) for y in (k, v))
    y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
    return layer.out_proj(y.transpose(1, 2).flatten(2))


def convolution(layer, x):
    b, c, y = layer.in_proj(x).chunk(3, -1)
    y = F.pad(b * y, (0, 0, layer.conv_kernel_size - 1, 0))
    taps = layer.conv.weight.squeeze(1)
    y = sum(y[:, i:i + x.shape[1]] * taps[:, i] for i in range(layer.conv_kernel_size))
    return layer.out_proj(c * y)


def decoder_layer(layer, x, cos, sin):
    y = norm(layer.operator_norm, x)
    x = x + (attention(layer.self_attn, y, cos, sin) if layer.is_attention_layer else convolution(layer.conv, y))
    y = norm(layer.ffn_norm, x)
    if hasattr(layer.feed_forward, "w1"):
        return x + layer.feed_forward(y), None
    y, load = experts(layer.feed_forward, y)
    return x + y, load


def forward(model, ids, run=decoder_layer):
    """The last hidden states [rows, length, hidden] and how many tokens each expert got [MoE layers, experts]: the model of
    transformers, written for training; the report checks that both give the same."""
    body, loads = model.model, []
    x = body.embed_tokens(ids)
    cos, sin = body.pos_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
    for layer in body.layers:
        x, load = run(layer, x, cos[:, None], sin[:, None])
        loads.append(load)
    return norm(body.embedding_norm, x), torch.stack([load for load in loads if load is not None])


def loss_of(x, head, rows, marks):
    each = F.cross_entropy(F.linear(x, head).flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
    marks = marks[:, 1:].flatten().float()
    return (each * marks).sum() / marks.sum()


class Trainer:
    """One training step for each of the two shapes of batch; on a GPU compiled, and captured as a CUDA graph."""

    def __init__(self, model, device, batch, options):
        self.model, self.device, self.options = model, device, options
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        cuda = device.type == "cuda"
        self.rate = torch.tensor(1e-9, device=device)
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": options.decay}, {"params": vectors, "weight_decay": 0.0}],
                                           lr=self.rate if cuda else 1e-9, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
        self.blocks = [layer.feed_forward for layer in model.model.layers if not hasattr(layer.feed_forward, "w1")]
        self.nudge = torch.tensor(options.nudge, device=device)
        self.loads = torch.zeros(len(self.blocks), EXPERTS, device=device)
        self.loss = torch.zeros((), device=device)
        self.ids = {n: torch.zeros(batch // n, n + 1, dtype=torch.long, device=device) for n in LENGTHS}
        self.marks = {n: torch.ones(batch // n, n + 1, dtype=torch.uint8, device=device) for n in LENGTHS}
        torch._dynamo.config.recompile_limit = 64
        pack = lambda f: torch.compile(f, dynamic=False, backend=options.backend) if options.compile else f
        self.layer, self.loss_of = pack(decoder_layer), pack(loss_of)
        self.graphs = {}

    def forward(self, rows, marks):
        x, loads = forward(self.model, rows[:, :-1], self.layer)
        return self.loss_of(x, self.model.lm_head.weight, rows, marks), loads

    def once(self, length):
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if cuda else nullcontext():
            loss, loads = self.forward(self.ids[length], self.marks[length])
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            # Experts with too many tokens become less likely to be chosen, by the sign of the error alone.
            for block, load in zip(self.blocks, loads):
                block.expert_bias.add_(self.nudge * torch.sign(load.mean() - load))
                block.expert_bias.sub_(block.expert_bias.mean())
            self.loads.add_(loads)
            self.loss.copy_(loss.detach())

    def capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for length in LENGTHS:
                for _ in range(3):
                    self.once(length)
        torch.cuda.current_stream().wait_stream(stream)
        for length in LENGTHS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.once(length)
            self.graphs[length] = graph

    def step(self, length, ids, marks, rate):
        self.ids[length].copy_(ids)
        self.marks[length].copy_(marks)
        if self.device.type == "cuda":
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        if length in self.graphs:
            self.graphs[length].replay()
        else:
            self.once(length)


@torch.no_grad()
def held_out(model, rows):
    """Nats a token."""
    logits = F.linear(forward(model, rows[:, :-1])[0], model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def train(model, data, held, device, options):
    """`held`: ids [rows, length + 1] of held-out text, to watch."""
    sizes = (600, 160, 40) if options.check else (400_000, 80_000 - options.plain, options.plain)
    began = time.time()
    pools = [(torch.from_numpy(ids).to(device), torch.from_numpy(marks).to(device)) for ids, marks in data.pool(*sizes, LENGTHS)]
    print(f"{sum(ids.numel() for ids, _ in pools):,} tokens of rows in {time.time() - began:.1f} s", flush=True)
    trainer = Trainer(model, device, options.batch, options)
    if device.type == "cuda" and options.graphs:
        start = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            trainer.capture()
        except RuntimeError as error:
            print(f"no CUDA graphs: {error}", flush=True)
            trainer.graphs.clear()
        model.load_state_dict(start)
        trainer.loads.zero_()
        for state in trainer.optimizer.state.values():
            for value in state.values():
                value.zero_()
        print(f"compiled and captured after {time.time() - began:.1f} s", flush=True)
    generator = torch.Generator(device="cpu").manual_seed(options.seed)
    warmup, begin, at = (5 if options.check else 400), time.time(), 0
    while (done := (time.time() - begin) / (60 * options.minutes) if options.minutes else at / options.steps) < 1:
        which = PATTERN[at % len(PATTERN)] == "l"
        ids, marks = pools[which]
        length = LENGTHS[which]
        pick = torch.randint(len(ids), (options.batch // length,), generator=generator).to(device, non_blocking=True)
        rate = options.rate * min(1.0, (at + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        trainer.nudge.fill_(options.nudge * (1 - done))
        trainer.step(length, ids[pick].long(), marks[pick], rate)
        at += 1
        if at % (1 if options.check else 100) == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        if at % (5 if options.check else 1000) == 0:
            loads = trainer.loads / trainer.loads.sum(1, keepdim=True)
            trainer.loads.zero_()
            spent = time.time() - begin
            print(f"step {at} {'long' if which else 'short'} loss {trainer.loss.item():.4f} rate {rate:.2e} "
                  f"held out {held_out(model, held):.4f} "
                  f"load {loads.min():.3f} to {loads.max():.3f} {at * options.batch / spent / 1e6:.2f} M tokens/s {spent:.0f} s", flush=True)
    print(f"{at} steps, {at * options.batch:,} tokens in {time.time() - begin:.0f} s", flush=True)
    final, (trainer.layer, trainer.loss_of) = [], (decoder_layer, loss_of)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for (ids, marks), length in zip(pools, LENGTHS):
            n = options.batch // length
            final.append(sum(trainer.forward(ids[i:i + n].long(), marks[i:i + n])[0].item() for i in range(0, 8 * n, n)) / 8)
    print(f"train loss: chats {final[0]:.4f}, long chats and plain lines {final[1]:.4f} (nats a learned token)", flush=True)


def save(model, out):
    """Rounds every weight to bf16 and saves; expert_bias, which only ranks experts, stays f32 in the file with rounded values."""
    with torch.no_grad():
        for tensor in list(model.parameters()) + [b for n, b in model.named_buffers() if "expert_bias" in n]:
            tensor.copy_(tensor.bfloat16().float())
    copy = model.to("cpu")
    copy.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[7, 2], pad_token_id=0, do_sample=False)
    biases = {n: b.clone() for n, b in copy.named_buffers() if n.endswith("expert_bias")}
    copy.bfloat16()
    for name, bias in biases.items():
        module, _, leaf = name.rpartition(".")
        copy.get_submodule(module)._buffers[leaf] = bias
    copy.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="of training, instead of a number of steps; the schedule ends with them")
    parser.add_argument("--batch", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--plain", type=int, default=8000, help="of 80000 long rows, those with plain lines")
    parser.add_argument("--nudge", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    options = parser.parse_args()
    if not options.evaluate:
        if options.check:
            options.device, options.steps, options.minutes, options.batch = "cpu", min(options.steps, 20), None, 1024
            options.compile = options.compile and options.backend != "inductor"
        device = torch.device(options.device)
        torch.manual_seed(options.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
        corpus = json.loads(options.corpus.read_text())
        print(f"torch {torch.__version__}, {device}", flush=True)
        model = Lfm2MoeForCausalLM(config()).to(device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        held = tokenizer.encode((HERE / "heldout.txt").read_text(), add_special_tokens=False).ids
        held = torch.tensor(held[:len(held) // 255 * 255]).view(-1, 255)[:4 if options.check else None]
        held = torch.cat([torch.ones(len(held), 1, dtype=torch.long), held], 1).to(device)
        train(model, Data(corpus, tokenizer, options.seed), held, device, options)
        save(model, options.out)
    report(options.out, forward)


if __name__ == "__main__":
    main()
