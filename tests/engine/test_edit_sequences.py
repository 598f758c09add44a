"""Conversations that are appended to, edited, branched, cancelled, evicted and restarted: the text of each turn is that
of a server without any cache."""

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence

NAMES = ("llama", "gemma3_text", "olmo_hybrid")
model = lru_cache(random_model)
SYSTEM, OPENING = prompt(40, seed=99), (7, 8, 9)
MOST = 500  # tokens of a conversation


@lru_cache(maxsize=4096)
def right(name, tokens):
    """The answer without any cache."""
    return tuple(Driver(Scheduler(model(name)), sequence(0, tokens, max_tokens=4)).finish()[0])


class Server:
    """A model with a prefix cache in memory and on disk, and a conversation with it: its turns, each with an answer."""

    def __init__(self, name, folder):
        self.name, self.folder = name, Path(folder)
        self.turns = []
        self.start()

    def start(self):
        self.disk = DiskTier(self.folder, 1 << 28)
        self.cache = PrefixCache(RamTier(), self.disk)
        self.load()

    def load(self):
        self.prefixes = self.cache.open(ModelIdentity(self.name), 1 << 28, self.name)
        self.prefixes.is_warm = True
        self.driver = Driver(Scheduler(model(self.name), prefixes=self.prefixes, stall_target=0.001))

    def prompt(self, question):
        """The tokens of the conversation with one more question, and its boundaries."""
        history = SYSTEM + sum((asked + OPENING + answer for asked, answer in self.turns), ())
        tokens = history + question + OPENING
        return tokens, (len(SYSTEM), len(history), len(tokens) - len(OPENING))

    def submit(self, question, max_tokens=4):
        tokens, boundaries = self.prompt(question)
        id = len(self.driver.tokens)
        self.driver.add(replace(sequence(id, tokens, max_tokens=max_tokens), boundaries=boundaries))
        return id, tokens

    def append(self, length, seed):
        if len(self.prompt(())[0]) + length > MOST:
            self.turns = []
        question = prompt(length, seed=seed)
        id, tokens = self.submit(question)
        answer = tuple(self.driver.finish()[id])
        assert answer == right(self.name, tokens)
        self.turns.append((question, answer))

    def edit(self, length, seed):
        """The last turn with another question."""
        self.turns = self.turns[:-1]
        self.append(length, seed)

    def branch(self, length, seed):
        """Another turn behind an earlier one, whose answer was re-rendered."""
        self.turns = self.turns[: seed % (len(self.turns) + 1)]
        if self.turns:
            question, answer = self.turns[-1]
            self.turns[-1] = question, answer[seed % 3 :]
        self.append(length, seed)

    def cancel(self, length, seed):
        """A turn whose client leaves, while the prompt is read or while the answer comes."""
        id, _ = self.submit(prompt(length, seed=seed), max_tokens=50)
        for _ in range(seed % 5):
            self.driver.step()
        self.driver.scheduler.remove([id])
        self.driver.finish()
        self.append(length, seed)

    def evict(self, length, seed):
        """The model is unloaded, and loaded again."""
        self.prefixes.close()
        self.load()
        self.append(length, seed)

    def restart(self, length, seed):
        """The process ends, after what it had to write was written or before."""
        if seed % 2:
            self.disk.flush()
        self.disk.close()
        self.start()
        self.append(length, seed)


EDITS = st.sampled_from(["append", "edit", "branch", "cancel", "evict", "restart"])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(st.lists(st.tuples(EDITS, st.integers(5, 150), st.integers(0, 7)), min_size=3, max_size=10))
def test_the_text_is_that_without_any_cache(name, edits):
    with tempfile.TemporaryDirectory() as folder:
        server = Server(name, folder)
        for edit, length, seed in edits:
            getattr(server, edit)(length, seed)
        server.disk.close()
