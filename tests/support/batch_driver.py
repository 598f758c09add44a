"""Drives a scheduler as the engine does."""

import random

from mlxserver.engine.requests import Sampling
from mlxserver.engine.sequence import Sequence

GREEDY = Sampling(temperature=0.0)


SEEDED = Sampling(temperature=1.0, top_p=0.9, seed=11)


def prompt(length, seed=0):
    return tuple(random.Random(seed).choices(range(2, 300), k=length))


def row(id, tokens, sampling=GREEDY, max_tokens=8):
    return Sequence(id, tuple(tokens), sampling, max_tokens)


class Driver:
    """Runs a batcher as the engine does: a decode, a prefill, and rows leave with their last token."""

    def __init__(self, batcher, *rows):
        self.batcher = batcher
        self.rows = {}
        self.tokens = {}
        self.cached = {}
        self.add(*rows)

    def add(self, *rows):
        for row in rows:
            self.rows[row.id] = row
            self.tokens[row.id] = []
            self.batcher.insert([row])

    def step(self):
        finished = []
        for token in self.batcher.decode():
            said = self.tokens[token.sequence_id]
            said.append(token.token)
            self.cached[token.sequence_id] = token.cached_tokens
            if len(said) == self.rows[token.sequence_id].max_tokens:
                finished.append(token.sequence_id)
        self.batcher.remove(finished)
        self.batcher.prefill()

    def until(self, condition):
        for _ in range(5000):
            if condition():
                return
            self.step()
        raise AssertionError("the batch does not get there")

    def until_said(self, id, count=1):
        self.until(lambda: len(self.tokens[id]) >= count)

    def finish(self):
        self.until(self.batcher.is_empty)
        return self.tokens
