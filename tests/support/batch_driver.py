"""Drives a scheduler as the engine does."""

import random

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.sequence import Sequence

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=11)


def prompt(length, seed=0):
    return tuple(random.Random(seed).choices(range(2, 300), k=length))


def sequence(id, tokens, sampling=GREEDY, max_tokens=8, **fields):
    return Sequence(id, tuple(tokens), sampling, max_tokens, **fields)


def with_chunk_times(prefill, each=0.1):
    """Have every chunk count as one of so many seconds per token, however long it takes: it is of the smallest size."""
    prefill.times.each = each
    prefill.times.note = lambda *_: None


class Driver:
    """Runs a scheduler as the engine does: a decode, a prefill, and sequences leave with their last token."""

    def __init__(self, scheduler, *sequences):
        self.scheduler = scheduler
        self.sequences = {}
        self.tokens = {}
        self.cached = {}
        self.prompt_logprobs = {}
        self.add(*sequences)

    def add(self, *sequences):
        for sequence in sequences:
            self.add_choices(sequence)

    def add_choices(self, *sequences):
        """Sequences of one request."""
        for sequence in sequences:
            self.sequences[sequence.id] = sequence
            self.tokens[sequence.id] = []
        self.scheduler.insert(sequences)

    def step(self):
        finished = []
        for token in self.scheduler.decode():
            generated = self.tokens[token.sequence_id]
            generated.append(token.token)
            if token.prompt_logprobs is not None:
                self.prompt_logprobs[token.sequence_id] = token.prompt_logprobs
            self.cached[token.sequence_id] = token.cached_tokens
            if len(generated) == self.sequences[token.sequence_id].max_tokens:
                finished.append(token.sequence_id)
        self.scheduler.remove(finished)
        self.scheduler.prefill()

    def until(self, condition):
        for _ in range(5000):
            if condition():
                return
            self.step()
        raise AssertionError("the batch does not get there")

    def until_generated(self, id, count=1):
        self.until(lambda: len(self.tokens[id]) >= count)

    def finish(self):
        self.until(self.scheduler.is_empty)
        return self.tokens
