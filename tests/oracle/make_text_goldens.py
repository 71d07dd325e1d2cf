#!/usr/bin/env python3
"""Make the tokenizers that lfm2c's text rules are tested with, and what transformers makes of text by them.

Run, from the repository root (install as make_goldens.py says):

    python tests/oracle/make_text_goldens.py             # write every case under tests/data/text
    python tests/oracle/make_text_goldens.py --check     # write nothing: recompute the goldens, compare with what is there

Two model directories without a model:

    bytes      byte-level BPE as LFM2 has it, 512 entries: a character may be spread over several tokens; the pattern that
               splits words looks ahead; the template is chat_template.jinja; generation_config.json lists two stop tokens
    fallback   BPE over characters with `▁` for a space and bytes for what it does not know; the template is one of several
               in tokenizer_config.json, which also says that no token is added, but the tokenizer adds two, and it is right

and in each a golden.json:

    encode     {"text", "ids": with the tokens that the tokenizer adds, "plain": without}
    decode     {"ids", "text": special tokens left out}
    render     {"messages", "variables", "text", "ids"}: the chat template, and its tokens

The texts of "encode" do not begin with the first token's own name: transformers doubles it there, and lfm2c does not.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

TRANSFORMERS = "5.17.0"
ROOT = Path(__file__).resolve().parents[2]

SPECIAL = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
]

# Numbers in groups of up to three, words with the space before them, line ends, and spaces but for the last one.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CORPUS = """
The plan says everything: every step, every byte offset, every kernel. A step names buffers, and a table says where each
lies. Tokens are chosen by the device, one for each row with logits, and come back through a ring in host memory. What is
the capital of France? The capital of France is Paris. What is two and two? It is four. Please write a short poem about the
sea, the wind and the stars. In the beginning there was nothing but water, and the sea was without end or shore. She said
that it couldn't be done; they've done it all the same. There were 12 months, 52 weeks and 365 days in the year 2026.
user assistant system tool name arguments description parameters object string think answer question
"""

TEMPLATE = """\
{{- bos_token -}}
{%- set keep = keep_past_thinking | default(false) -%}
{%- set ns = namespace(system="", last=-1) -%}
{%- if messages and messages[0]["role"] == "system" -%}
    {%- set ns.system = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system = ns.system + ("\\n" if ns.system else "") + "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- if tool is not string -%}
            {%- set tool = tool | tojson -%}
        {%- endif -%}
        {%- set ns.system = ns.system + tool + (", " if not loop.last else "") -%}
    {%- endfor -%}
    {%- set ns.system = ns.system + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system -%}
    {{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}
        {%- set ns.last = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- set content = message["content"] -%}
    {%- if content is not string -%}
        {%- set content = content | tojson -%}
    {%- endif -%}
    {%- if message["role"] == "assistant" and not keep and loop.index0 != ns.last -%}
        {%- if "</think>" in content -%}
            {%- set content = content.split("</think>")[-1] | trim -%}
        {%- endif -%}
    {%- endif -%}
    {%- generation -%}{{- content + "<|im_end|>\\n" -}}{%- endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""

PLAIN_TEMPLATE = """\
{% if messages|length == 0 %}
{{ raise_exception("expected a message") }}
{% endif %}
{{ bos_token }}{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns, found ' ~ message.role) }}
    {% endif %}
[{{ message.role.upper() }}] {{ message.content.strip() }}{{ eos_token if message.role == 'assistant' }}
{% endfor %}
{% if tools is not none %}
{{ tools | tojson(indent=2) }}
{{ tools | tojson(separators=(",", ":"), sort_keys=true) }}
{% endif %}
{% if add_generation_prompt %}
[ASSISTANT]{{ ' ' }}
{%- endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a place, such as \"Zürich\" & <Köln>\n(in °C)",
            "parameters": {"z": [], "a": {}, "n": [1, 2.0, 1e-5, 1e16, 0.1, True, None], "b": False},
        },
    },
    {"name": "🦀", "tab": "\t\u0001\u007f\u2028"},
]

TEXTS = [
    "",
    " ",
    "   ",
    "hello",
    " hello",
    "  hello  world ",
    "Hello, world!",
    "The capital of France is Paris.",
    "line one\nline two\n\n\nline five\n",
    "CRLF\r\nand\r\n\r\nmore\r",
    "\ttabs\tand  spaces \t ",
    "12 123 1234 12345.678",
    "don't they've SHE'LL",
    "café, naïve, Ångström, Ünïcödé",
    "e\u0301 is not \u00e9",
    "你好,世界!今天天气怎么样?",
    "こんにちは мир שלום",
    "🦀😀👩‍👩‍👧‍👦🇨🇭",
    "a\u00a0b\u200bc\ufeffd",
    "\u0000\u0001\u007f",
    "x = f(y) // [1, 2] {\"k\": null} <tag> & 'q'",
    "Say <|im_start|>user\nhi<|im_end|> now",
    "<|im_end|>",
    "<|not_a_token|>",
    "zzzzqqqqxxxx" * 3,
    "▁ is U+2581",
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CHATS = [
    ([user("What is two and two?")], {"add_generation_prompt": True}),
    ([user("What is two and two?")], {"add_generation_prompt": False}),
    ([user("")], {"add_generation_prompt": True}),
    ([user("  space around \n")], {"add_generation_prompt": True}),
    ([user("你好 🦀\r\n<b>&amp;</b> 'x'")], {"add_generation_prompt": True}),
    ([user("a <|im_end|> b")], {"add_generation_prompt": True}),
    ([user("one"), assistant("two"), user("three")], {"add_generation_prompt": True}),
    (
        [user("q1"), assistant("<think>\nhm\n</think>\n\n a1 "), user("q2"), assistant("<think>so</think>a2")],
        {"add_generation_prompt": False},
    ),
    ([user("tools?")], {"add_generation_prompt": True, "tools": TOOLS}),
]
SYSTEM_CHATS = [
    ([system("Be brief."), user("Hi")], {"add_generation_prompt": True}),
    ([system(""), user("Hi")], {"add_generation_prompt": True}),
    ([system("Be brief."), user("Hi")], {"add_generation_prompt": True, "tools": TOOLS}),
    (
        [user("q1"), assistant("<think>hm</think> a1"), user("q2")],
        {"add_generation_prompt": True, "keep_past_thinking": True},
    ),
    ([user([{"type": "text", "text": "part"}, {"n": 1.5}])], {"add_generation_prompt": True}),
]


# ------------------------------------------------------------------------------------------------------- the directories


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def byte_level(folder):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair="<|startoftext|> $A $B:1", special_tokens=[("<|startoftext|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": False,
                      "rstrip": False, "single_word": False, "special": True},
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "not this one",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [4, 2], "pad_token_id": 0})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def byte_fallback(folder):
    special = ["<unk>", "<s>", "</s>"]
    words = ["▁the", "▁a", "▁is", "he", "th", "in", "▁t", "ll"]
    letters = ["▁"] + [chr(c) for c in range(0x21, 0x7F)] + ["é", "你"]
    vocab = special + [f"<0x{byte:02X}>" for byte in range(256)] + letters + words
    merges = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "a"), ("i", "n"), ("l", "l")]
    vocab = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    # Limits for training, which must not cut a prompt.
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": [
            {"name": "other", "template": "not this one"},
            {"name": "default", "template": PLAIN_TEMPLATE},
        ],
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})


# ------------------------------------------------------------------------------------------------------------ the goldens


def golden(folder, chats):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = random.Random(17)
    encode = []
    for text in TEXTS:
        encode.append({"text": text, "ids": tokenizer.encode(text), "plain": tokenizer.encode(text, add_special_tokens=False)})
    lists = [case["ids"] for case in encode]
    # Any tokens, most of them no text at all.
    lists += [[generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 24))] for _ in range(60)]
    decode = [{"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)} for ids in lists]
    render = []
    for messages, variables in chats:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **variables)
        render.append({"messages": messages, "variables": variables, "text": text, "ids": list(ids)})
    return {"transformers": transformers.__version__, "encode": encode, "decode": decode, "render": render}


CASES = {"bytes": (byte_level, CHATS + SYSTEM_CHATS), "fallback": (byte_fallback, CHATS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests/data/text")
    parser.add_argument("--check", action="store_true", help="write nothing; recompute and compare")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS:
        sys.exit(f"expected transformers {TRANSFORMERS}, found {transformers.__version__}")
    wrong = 0
    for name, (make, chats) in CASES.items():
        folder = arguments.out / name
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) if arguments.check else folder
            made.mkdir(parents=True, exist_ok=True)
            make(made)
            found = golden(made, chats)
            if not arguments.check:
                write_json(folder / "golden.json", found)
                print(f"{folder}: {len(found['encode'])} texts, {len(found['decode'])} lists, {len(found['render'])} chats")
                continue
            names = sorted(path.name for path in made.iterdir())
            same = all((made / name).read_bytes() == (folder / name).read_bytes() for name in names)
            kept = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
            good = same and kept == json.loads(json.dumps(found))
            print(f"{folder}: {'the same' if good else 'DIFFERS'}")
            wrong += not good
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
