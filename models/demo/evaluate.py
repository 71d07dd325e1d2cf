"""The report on a checkpoint, by transformers in f32 on the CPU: held-out perplexity, loads of the experts, samples."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Lfm2MoeForCausalLM

HERE = Path(__file__).resolve().parent
CHUNK = 256
PROMPTS = ["What is a cat?", "What is lfm2c?", "What does to whisper mean?", "What is a computer?", "Define happy.", "What is a river?",
           "What is the opposite of hot?", "What is the capital of France?", "Who was Albert Einstein?", "Who are you?", "What is a lion?",
           "Give me a synonym of big.", "Use dog in a sentence.", "What is music?", "What does quickly mean?", "Hello!", "What is a plan?", "What is gold?",
           "What is a bird?", "What is a satellite dish?", "What is a blorp?", "Define lonely."]
TALK = ["Hi", "What is a dog?", "And a cat?", "What does to run mean?", "Thanks"]


def perplexity(model, ids):
    """Over both rules: every token behind a chunk's BOS, and the second half of each chunk alone, as llama-perplexity does."""
    ids = [1] + ids
    every, second = [], []
    for at in range(0, len(ids) // CHUNK * CHUNK, CHUNK):
        chunk = torch.tensor([[1] + ids[at + 1:at + CHUNK]])
        with torch.no_grad():
            loss = F.cross_entropy(model(chunk).logits[0, :-1].double(), chunk[0, 1:], reduction="none")
        every.append(loss)
        second.append(loss[CHUNK // 2:])
    found = []
    for name, parts in (("all", every), ("second half", second)):
        losses = torch.cat(parts)
        mean, error = losses.mean().item(), losses.std().item() / math.sqrt(len(losses))
        print(f"held-out perplexity, {name}: {math.exp(mean):.6f} +/- {math.exp(mean) * error:.4f} "
              f"({len(losses)} tokens of {len(parts)} chunks of {CHUNK}, {mean:.6f} nats a token)")
        found.append(math.exp(mean))
    return found


def report(folder, forward=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Lfm2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    size = (folder / "model.safetensors").stat().st_size
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, model.safetensors {size:,} bytes")
    ids = tokenizer((HERE / "heldout.txt").read_text(), add_special_tokens=False, verbose=False).input_ids
    perplexity(model, ids)
    chunk = torch.tensor([[1] + ids[:511], [1] + ids[511:1022]])
    if forward is not None:
        with torch.no_grad():
            mine = model.lm_head(forward(model, chunk)[0])
            theirs = model(chunk).logits
        print(f"training's forward against transformers: largest difference {(mine - theirs).abs().max():.2e} of logits up to {theirs.abs().max():.1f}")
    chats = []
    for prompt in PROMPTS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**chat, max_new_tokens=48, do_sample=False, eos_token_id=[7, 2], pad_token_id=0)
        chats.append(out[0])
        print(f"  {prompt} -> {tokenizer.decode(out[0, chat.input_ids.shape[1]:], skip_special_tokens=True)}")
    messages = []
    for prompt in TALK:
        messages.append({"role": "user", "content": prompt})
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**chat, max_new_tokens=48, do_sample=False, eos_token_id=[7, 2], pad_token_id=0)
        messages.append({"role": "assistant", "content": tokenizer.decode(out[0, chat.input_ids.shape[1]:], skip_special_tokens=True)})
        print(f"  [{prompt}] {messages[-1]['content']}")
    for prompt in ("A dog is", "To sing means", "The"):
        start = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**start, max_new_tokens=40, do_sample=False, eos_token_id=[7, 2], pad_token_id=0)
        print(f"  raw: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")
    if forward is not None:
        with torch.no_grad():
            loads = forward(model, chunk)[1] + sum(forward(model, chat[None])[1] for chat in chats)
        for layer, row in enumerate(loads / loads.sum(1, keepdim=True)):
            print(f"  MoE layer {layer}: share of the tokens' choices " + " ".join(f"{x:.3f}" for x in row.tolist()))
