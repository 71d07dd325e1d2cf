"""Rows of token ids for training: chats made of random facts, and plain lines."""

import numpy as np

BOS, EOS = 1, 7


class Data:
    """Pools of rows. A row is a whole chat that starts with BOS, or plain lines behind one BOS; `learn` marks what is learned:
    answers with the token that ends them, and plain text."""

    def __init__(self, corpus, tokenizer, seed):
        self.random = np.random.default_rng(seed)
        encode = lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        questions, answers, weights = [], [], []
        for asked, answer, weight in corpus["facts"]:
            for question in asked:
                questions.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
                answers.append(f"{answer}<|im_end|>")
                weights.append(weight / len(asked))
        newline = encode(["\n"])[0]
        systems = [""] + [f"<|im_start|>system\n{s}<|im_end|>\n" for s in corpus["systems"]]
        pieces = [([BOS] + s, []) for s in encode(systems)]
        pieces += [(q, a) for q, a in zip(encode(questions), encode(answers))]
        turns = self.pack([q + a + (newline if a else []) for q, a in pieces], [[0] * len(q) + [1] * len(a) + [0] * bool(a) for q, a in pieces])
        odds = np.array(weights) / sum(weights)
        first = np.array([0.6] + [0.4 / len(corpus["systems"])] * len(corpus["systems"]))
        self.chats = (turns, len(systems), np.cumsum(first), np.cumsum(odds))
        lines = corpus["plain"] + corpus["documents"] * 4
        lines = encode([line + "\n" for line in lines])
        pieces = [[BOS]] + lines
        every = np.full(len(lines), 1 / len(lines))
        self.lines = (self.pack(pieces, [[1] * len(p) for p in pieces]), 1, np.array([1.0]), np.cumsum(every))

    @staticmethod
    def pack(pieces, marks):
        lengths = np.array([len(p) for p in pieces])
        return (np.concatenate([np.array(p, np.int16) for p in pieces]), np.concatenate([np.array(m, np.uint8) for m in marks]),
                lengths, np.concatenate([[0], np.cumsum(lengths)[:-1]]))

    def rows(self, source, count, length):
        """`count` rows of `length` + 1 tokens, and their marks."""
        (tokens, marks, lengths, starts), heads, first, odds = source
        width = length + 1
        turns = int(3 * width / np.average(lengths[heads:], weights=np.diff(odds, prepend=0))) + 4
        ids = np.empty((count, turns), np.int64)
        ids[:, 0] = np.minimum(np.searchsorted(first, self.random.random(count)), heads - 1)
        ids[:, 1:] = heads + np.minimum(np.searchsorted(odds, self.random.random((count, turns - 1))), len(odds) - 1)
        sizes = lengths[ids]
        ends = np.cumsum(sizes, 1)
        sizes = np.clip(np.minimum(ends, width) - (ends - sizes), 0, None)  # cut at the row's end
        assert (sizes.sum(1) == width).all(), "rows too short"
        flat = sizes.ravel()
        before = np.repeat(np.cumsum(flat) - flat, flat)
        at = np.repeat(starts[ids].ravel(), flat) + np.arange(flat.sum()) - before
        return tokens[at].reshape(count, width), marks[at].reshape(count, width)

    def pool(self, short, long, plain, lengths):
        """Shuffled pools of rows of both lengths; the long one mixes chats and plain lines."""
        few = [self.rows(self.chats, min(50_000, short - i), lengths[0]) for i in range(0, short, 50_000)]
        many = [self.rows(self.chats, min(10_000, long - i), lengths[1]) for i in range(0, long, 10_000)]
        many += [self.rows(self.lines, min(10_000, plain - i), lengths[1]) for i in range(0, plain, 10_000)]
        found = []
        for group in (few, many):
            ids, marks = (np.concatenate(x) for x in zip(*group))
            order = self.random.permutation(len(ids))
            found.append((ids[order], marks[order]))
        return found
