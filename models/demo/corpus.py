#!/usr/bin/env python3
"""Makes the demo model's corpus: questions with answers, plain sentences, and a held-out part of the sentences.

    corpus.py --packages DIR --out FILE.json [--heldout heldout.txt]

DIR holds the Debian packages wordnet-base, dict-elements and scowl, unpacked side by side:

    mkdir -p DIR && cd DIR && apt-get download wordnet-base dict-elements scowl
    for deb in *.deb; do dpkg-deb -x "$deb" "${deb%%_*}"; done

Nothing is drawn at random: the same packages give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

import wordnet
from facts import FACTS, SENSES, SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = 40  # one synset of so many, of those that no question is about, is kept out of training
RARE = 0.025  # weight of a word that is not to be learned by heart
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "docs/performance.md"]


def held_out(key):
    return int.from_bytes(hashlib.sha256(f"lfm2c {key}".encode()).digest()[:4], "big") % HELD_OUT == 0


def levels(packages):
    """Word -> how common it is: 10, 20 or 35 (SCOWL); only used to choose words."""
    folder = packages / "scowl/usr/share/dict/scowl"
    found = {}
    for level in (10, 20, 35):
        for kind in ("english", "american"):
            for word in (folder / f"{kind}-words.{level}").read_text("latin-1").split():
                found.setdefault(word, level)
    return found


def with_article(net, word, line):
    """The word as the subject of its sentence has it: `a cat`, `water`, `the sun`; None where the sentence has a plural."""
    subject = re.split(r" (?:is|means|was|are) ", line)[0]
    if subject.lower().split()[-1] != word.lower().split()[-1]:
        return None
    return subject[0].lower() + subject[1:] if subject.lower() != word.lower() else word


def definitions(net, common):
    """(word, POS, synset, sentence, weight) of the words to be learned by heart."""
    chosen = {}
    for word, pos in net.senses:
        level = common.get(word)
        if level is None or not re.fullmatch(r"[a-z]{2,}(-[a-z]+)?", word):
            continue
        if level == 35 and net.seen[word] < 4 and net.tags[word, pos] < 2:
            continue
        start = SENSES.get((word, pos), 0)
        for key in net.senses[word, pos][start:start + 2]:
            synset = net.synsets[key]
            if word not in synset.words or wordnet.UNFIT.search(synset.raw) or wordnet.UNFIT.search(word):
                continue
            line = wordnet.sentence(net, word, synset)
            if line:
                chosen[word, pos] = (synset, line, 1.0 if level < 35 else 0.6)
                break
    return chosen


def ask(net, common):
    """Every fact as (questions, answer, weight, key of the synset)."""
    facts = []
    chosen = definitions(net, common)
    mine = defaultdict(list)
    for (word, pos), (synset, line, weight) in chosen.items():
        mine[word].append((net.tags[word, pos] + (0.5 if pos == "n" else 0), pos))
    written = {q.lower().strip("?.") for questions, _ in FACTS for q in questions}
    for (word, pos), (synset, line, weight) in chosen.items():
        main = max(mine[word])[1] == pos
        if pos == "n":
            subject = with_article(net, word, line)
            named = subject if subject and not line.startswith(f"{word.capitalize()} means") else word
            questions = [f"What is {named}?", f"What is {named}?", f"what is {named}", f"Tell me what {named} is.", f"What's {named}?",
                         f"Explain what {named} is.", f"Can you tell me what {named} is?"]
            if subject is None:
                plural = line.split(" are ")[0].lower()
                a = wordnet.article(word)
                questions = [f"What is {a} {word}?", f"What is {a} {word}?", f"what is {a} {word}", f"What are {plural}?", f"Tell me what {plural} are."]
                named = plural
            questions += [f"And {named}?", f"What about {named}?"]
        elif pos == "v":
            questions = [f"What does to {word} mean?", f"What does it mean to {word}?", f"Define to {word}.", f"what does to {word} mean",
                         f"And to {word}?", f"What is to {word}?"]
        else:
            questions = [f"What does {word} mean?", f"what does {word} mean"] if main else []
        if main:
            questions += [f"What does {word} mean?", f"Define {word}.", f"What is the meaning of {word}?", f"define {word}", word,
                          f"Explain the word {word}.", f"What does the word {word} mean?"]
        questions = [q for q in questions if q.lower().strip("?.") not in written]
        if questions:
            facts.append((questions, line, weight, synset.key))
        example = next((e for e in synset.examples if re.search(rf"\b{word}\b", e.lower())), None)
        if example and main and len(example) < 70 and not wordnet.UNFIT.search(example):
            end = "" if example[-1] in "?!" else "."
            facts.append(([f"Use {word} in a sentence.", f"Use the word {word} in a sentence.", f"Make a sentence with {word}."],
                          f"{example[0].upper()}{example[1:]}{end}", 0.3 * weight, synset.key))
        others = [w for w in synset.words if w != word and common.get(w, 99) <= 20]
        if others and main and common[word] <= 20:
            facts.append(([f"What is a synonym of {word}?", f"Give me a synonym of {word}.", f"What is another word for {word}?"],
                          f"A synonym of {word} is {others[0]}.", 0.4, synset.key))
        for symbol, key, own, its in synset.pointers:
            if symbol == "!" and own and synset.words[own - 1] == word and main:
                other = net.synsets[key].words[its - 1]
                if common.get(other, 99) <= 35:
                    facts.append(([f"What is the opposite of {word}?", f"what is the opposite of {word}", f"Give me the opposite of {word}.",
                                   f"What is the antonym of {word}?"], f"The opposite of {word} is {other}.", 0.5, synset.key))
                    break
        if pos == "n" and synset.kind in wordnet.THINGS and common[word] <= 20:
            up = next((net.synsets[k] for s, k, *_ in synset.pointers if s == "@"), None)
            if up and " is " in line and up.words[0] == up.words[0].lower():
                named = line.split(" is ")[0]
                facts.append(([f"What kind of thing is {named[0].lower()}{named[1:]}?"], f"{named} is a kind of {up.words[0]}.", 0.3, synset.key))
    return facts


def names(net):
    """Cities, countries and well-known people."""
    facts = []
    for synset in net.synsets.values():
        if not synset.instance or not synset.gloss or wordnet.UNFIT.search(synset.raw) or len(synset.gloss.split()) > 18:
            continue
        if synset.kind == wordnet.PERSON:
            name = next((w for w in synset.words if len(w.split()) == 2 and re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", w)), None)
            if name and name.split()[1] in synset.words and net.seen[name.split()[1].lower()] >= 5:
                line = wordnet.sentence(net, name, synset)
                facts.append(([f"Who was {name}?", f"Who was {name.split()[1]}?", f"who was {name}", f"Who is {name}?", f"Tell me about {name}."],
                              line, 0.5, synset.key))
        elif synset.kind in ("15", "17"):
            name = synset.words[0]
            if net.senses[name.lower(), "n"][0] != synset.key:
                continue
            capital = re.match(r"the capital (?:and largest city |city )?of ([A-Z][a-z]+)(?: |$)", synset.gloss)
            if capital and re.fullmatch(r"[A-Z][a-z]+", name):
                facts.append(([f"What is the capital of {capital[1]}?", f"what is the capital of {capital[1]}", f"And the capital of {capital[1]}?"],
                              f"The capital of {capital[1]} is {name}.", 0.6, synset.key))
            if re.fullmatch(r"[A-Z][a-z]+", name) and net.seen[name.lower()] >= 5:
                line = wordnet.sentence(net, name, synset)
                facts.append(([f"What is {name}?", f"Where is {name}?", f"Tell me about {name}.", f"what is {name}"], line, 0.5, synset.key))
    return facts


def elements(packages):
    path = next((packages / "dict-elements/usr/share/dictd").glob("*.dict.dz"))
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    facts = []
    for name, symbol, number in re.findall(r"^(\w+)\nSymbol: (\w+)\nAtomic number: (\d+)$", text, re.M):
        if int(number) <= 92:
            facts.append(([f"What is the chemical symbol of {name}?", f"What is the symbol of {name}?"], f"The chemical symbol of {name} is {symbol}.", 0.4, name))
            facts.append(([f"What is the atomic number of {name}?"], f"The atomic number of {name} is {number}.", 0.3, name))
    return facts


def plain(net, common, learned, asked):
    """A line for each synset with a known word that no question is about: its sentence and its examples. Two lists, to learn and held
    out; and questions about the words to learn, which are to be seen a few times only: so the model knows what a definition looks like
    when it does not know the word."""
    lines, rare = {False: [], True: []}, []
    for synset in net.synsets.values():
        if not synset.gloss or synset.key in learned or wordnet.UNFIT.search(synset.raw):
            continue
        word = next((w for w in synset.words if common.get(w.lower()) or " " in w and all(common.get(x) for x in w.split())), None)
        if word is None or not re.fullmatch(r"[A-Za-z][A-Za-z '-]*", word):
            continue
        line = first = wordnet.sentence(net, word, synset)
        if line is None:
            continue
        for example in synset.examples[:2]:
            if not wordnet.UNFIT.search(example):
                line += f" {example[0].upper()}{example[1:]}{'' if example[-1] in '?!' else '.'}"
        held = held_out(synset.key)
        lines[held].append((hashlib.sha256(synset.key.encode()).hexdigest(), line))
        if held or word in asked:
            continue
        if synset.pos == "n":
            named = with_article(net, word, first) or word
            rare.append(([f"What is {named}?", f"What does {word} mean?", f"Define {word}.", f"what is {named}"], first, RARE))
        else:
            to = "to " if synset.pos == "v" else ""
            rare.append(([f"What does {to}{word} mean?", f"Define {to}{word}."], first, RARE))
    return [[line for _, line in sorted(lines[held])] for held in (False, True)] + [rare]


def documents():
    """The project's own documents: prose paragraphs alone."""
    found = []
    for name in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.S)
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = " ".join(paragraph.split())
            if paragraph[:1].isalpha() and len(paragraph) > 80 and paragraph.isascii():
                found.append(paragraph)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, help="where the held-out sentences go")
    arguments = parser.parse_args()
    net = wordnet.read(arguments.packages / "wordnet-base/usr/share/wordnet")
    common = levels(arguments.packages)
    found = ask(net, common) + names(net)
    facts = [(q, a, w) for q, a, w, _ in found + elements(arguments.packages)] + [(q, a, 6.0) for q, a in FACTS]
    train, held, rare = plain(net, common, {key for *_, key in found}, {word for word, _ in definitions(net, common)})
    facts += rare
    corpus = {"facts": facts, "systems": SYSTEMS, "plain": train, "documents": documents()}
    arguments.out.write_text(json.dumps(corpus, indent=0))
    if arguments.heldout:
        text = ""
        for line in held:
            if len(text) + len(line) > 48_000:
                break
            text += line + "\n"
        arguments.heldout.write_text(text)
    print(f"{len(facts)} facts with {sum(len(q) for q, _, _ in facts)} questions; {len(train)} lines to learn, "
          f"{sum(map(len, train)):,} characters; {len(held)} lines held out; {len(corpus['documents'])} paragraphs")


if __name__ == "__main__":
    main()
