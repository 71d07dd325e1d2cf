"""Reads WordNet 3.0 as Debian's `wordnet-base` lays it out, and turns glosses into English sentences."""

import re
from collections import Counter
from dataclasses import dataclass, field

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# Kinds of noun (WordNet's lexicographer files) whose words nearly always take an article: animal, artifact, body, food, object,
# person, plant; and those that do where their gloss has one: event, group, communication, place, possession, quantity, shape, time.
THINGS = {"05", "06", "08", "13", "17", "18", "20"}
COUNTED = THINGS | {"10", "11", "14", "15", "21", "23", "25", "28"}
LIVING = {"05", "18", "20"}
PERSON = "18"
NO_NOUN = set("of in for with to by at on from as used being relating pertaining formerly usually often sometimes when where if".split())
THE = {"sun", "moon", "earth", "sky", "internet", "universe", "world", "future", "past", "sea", "equator"}
DETERMINERS = set("a an the any some one someone something anything that which what whatever whoever who all each every either "
                  "no your his her their its these those two three four several many most both".split())
STOPS = set("of in for with that which who whose having used made to from on by at as when where usually often especially "
            "after between under over through during without against among within near along into about against "
            "and or but found containing consisting similar such so not being than until because one its is are was "
            "capable native characterized located covered".split())
UNFIT = re.compile(
    r"offensive|obscen|derogat|disparag|slur\b|vulgar|slang|taboo|sex|genital|penis|vagina|copulat|intercourse|prostitut|"
    r"rape|nazi|suicid|homosex|lesbian|negro|\brace\b|racial|excrement|feces|urin|anus|buttocks|breast|masturbat|erotic|"
    r"pornograph|incest|contracepti|semen|\bwhore|\bslave|torture|\bkill|murder|drug", re.I)


@dataclass
class Synset:
    key: str  # POS and offset, such as n02121620
    pos: str
    kind: str
    words: list
    gloss: str  # the definition alone, cleaned; empty if it is no good for a sentence
    raw: str
    examples: list
    pointers: list  # (symbol, key, own word or 0, its word or 0)
    instance: bool = False


@dataclass
class WordNet:
    synsets: dict = field(default_factory=dict)
    senses: dict = field(default_factory=dict)  # (word in lower case, POS) -> keys, most frequent first
    tags: Counter = field(default_factory=Counter)  # (word, POS) -> how often it was seen in the tagged texts
    seen: Counter = field(default_factory=Counter)  # word -> occurrences in all glosses and examples
    counted: Counter = field(default_factory=Counter)  # noun -> occurrences behind a or an, or as a plural
    plurals: dict = field(default_factory=dict)

    def first(self, word, pos):
        return self.synsets[self.senses[word, pos][0]]

    def countable(self, word, default=False, share=0.15):
        total = self.seen[word] + sum(self.seen[p] for p in plural_forms(word))
        if total < 5:
            return default
        return self.counted[word] >= 2 and self.counted[word] >= share * total


def plural_forms(word):
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [word + "es"]
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return [word[:-1] + "ies"]
    return [word + "s"]


def clean(gloss):
    """A gloss's first definition as plain words, and its examples."""
    definition, _, rest = gloss.partition('"')
    examples = re.findall(r'"([^"]+)"', '"' + rest) if rest else []
    definition = re.sub(r"\([^()]*\)", " ", definition)
    definition = re.split(r"[;:]", definition.strip(" ;:,"))[0]
    definition = re.sub(r"\s+", " ", definition).replace(" ,", ",").replace("`", "'").replace("''", "'").strip(" ,.-")
    fit = (re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,.'/-]*", definition) is not None and 2 <= len(definition.split()) <= 22
           and "e.g" not in definition and "i.e" not in definition and "etc" not in definition and "--" not in definition
           and not definition.split()[-1] in {"of", "the", "a", "or", "and", "to", "with", "in", "by"})
    examples = [re.sub(r"\s+", " ", e).strip(" ;.,") for e in examples]
    examples = [e for e in examples if re.fullmatch(r"[A-Za-z][A-Za-z ,'?!-]*", e) and 4 <= len(e.split()) <= 13]
    return (definition if fit else ""), examples


def read(folder):
    net = WordNet()
    for name, pos in POS.items():
        for line in (folder / f"data.{name}").read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            parts = head.split()
            count = int(parts[3], 16)
            words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in parts[4:4 + 2 * count:2]]
            at = 4 + 2 * count
            pointers = []
            for i in range(int(parts[at])):
                symbol, offset, kind, ends = parts[at + 1 + 4 * i:at + 5 + 4 * i]
                pointers.append((symbol, kind + offset, int(ends[:2], 16), int(ends[2:], 16)))
            definition, examples = clean(gloss)
            net.synsets[pos + parts[0]] = Synset(pos + parts[0], pos, parts[1], words, definition, gloss.strip(), examples,
                                                 pointers, any(p[0] == "@i" for p in pointers))
        for line in (folder / f"index.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                net.senses[parts[0].replace("_", " "), pos] = [pos + o for o in parts[-int(parts[2]):]]
    by_number = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        net.tags[word.replace("_", " "), by_number[rest[0]]] += int(count)
    for line in (folder / "noun.exc").read_text("latin-1").splitlines():
        plural, *singular = line.split()
        net.plurals[plural] = singular[0]
    for synset in net.synsets.values():
        tokens = re.findall(r"[a-z]+(?:-[a-z]+)*", synset.raw.lower())
        net.seen.update(tokens)
        for before, word in zip(tokens, tokens[1:]):
            if before in ("a", "an"):
                net.counted[word] += 1
    for word, pos in list(net.senses):
        if pos == "n":
            for plural in plural_forms(word):
                if (plural, "n") not in net.senses and net.seen[plural]:
                    net.counted[word] += net.seen[plural]
                    net.plurals.setdefault(plural, word)
    return net


def article(phrase):
    word = phrase.lower()
    vowel = word[:1] in "aeiou" and not re.match(r"(uni([^nm]|$)|use|usu|uti|eu|one\b|once|ura)", word)
    return "an" if vowel or re.match(r"(hour|honest|honor|heir|herb\b)", word) else "a"


def head_noun(phrase):
    words = phrase.replace(",", " ,").split()
    for i, word in enumerate(words):
        last = word.lower()
        if i and (last in STOPS or last == "," or last.endswith("ly") and i > 1
                  or re.search(r"(ing|ed)$", last) and "-" not in last and words[i - 1].lower() not in STOPS and not words[i - 1].endswith(("ly", ","))):
            if last == "," or last in ("and", "or"):
                # "small, round fruit": adjectives go on behind the comma
                continue
            return words[i - 1].lower().strip(",")
    return words[-1].lower()


def noun_phrase(net, gloss, thing, living):
    """The gloss of a noun as a noun phrase, or None if none can be made with confidence."""
    words = gloss.split()
    if words[0].lower() in DETERMINERS:
        return gloss
    head = head_noun(gloss)
    if head in net.plurals or head.endswith("s") and not head.endswith(("ss", "us", "is")):
        return None
    if (head, "n") not in net.senses:
        return None
    if words[0].endswith("ing") and not thing:
        return gloss
    if living or net.countable(head, default=thing, share=0.03 if thing else 0.15):
        return f"{article(gloss)} {gloss}"
    return gloss


def sentence(net, word, synset):
    """`A cat is a feline mammal ...`: one sentence that defines a word, or None; and the word as a subject."""
    gloss = synset.gloss
    if not gloss:
        return None
    if synset.pos == "v":
        return f"To {word} means to {gloss}." if not gloss.split()[0] in DETERMINERS else None
    if synset.pos in "ar":
        return f"{word[0].upper()}{word[1:]} means {gloss}."
    if synset.instance:
        verb = "was" if synset.kind == PERSON else "is"
        phrase = gloss if gloss.split()[0] in DETERMINERS else f"{article(gloss)} {gloss}"
        return f"{word[0].upper()}{word[1:]} {verb} {phrase}."
    thing = synset.kind in THINGS
    if gloss.split()[0] in NO_NOUN:
        return None
    phrase = noun_phrase(net, gloss, thing, synset.kind in LIVING)
    proper = word != word.lower()
    counted = phrase is not None and phrase.split()[0] in ("a", "an", "any", "someone", "one") and synset.kind in COUNTED
    if phrase is None:
        plural = plural_forms(word)[0]
        if thing and not proper and head_noun(gloss) in net.plurals and net.seen[plural]:
            return f"{plural[0].upper()}{plural[1:]} are {gloss}."
        return f"{word[0].upper()}{word[1:]} means {gloss}."
    if word in THE:
        return f"The {word} is {phrase}."
    if not proper and net.countable(word.split()[-1], default=counted, share=0.02 if counted else 0.15):
        return f"{article(word).capitalize()} {word} is {phrase}."
    return f"{word[0].upper()}{word[1:]} is {phrase}."
