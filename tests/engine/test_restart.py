"""A real batch after a call that failed: what stays goes on from where it was, and says what it would have said."""

import random

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.requests import Sampling
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence


class Fault(Exception):
    """What the test throws."""


class Fuse:
    """Counts calls, and fails at some of them."""

    def __init__(self, *at):
        self.at = set(at)
        self.calls = 0

    def burn(self):
        self.calls += 1
        if self.calls in self.at:
            raise Fault


class FailingModel:
    """A model with a fuse."""

    def __init__(self, model, fuse):
        self._model = model
        self._fuse = fuse

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        self._fuse.burn()
        return self._model(*args, **kwargs)


class Even:
    """A constraint that allows tokens with even ids, and checks that it hears of each once."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        return b"\x55" * 50

    def accept(self, token):
        self.accepted.append(token)


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def prompt(length, seed):
    return tuple(random.Random(seed).choices(range(2, 300), k=length))


def rows(constrained):
    constraint = Even if constrained else lambda: None
    return [
        Sequence(1, prompt(30, 1), Sampling(temperature=0.0), 9, constraint=constraint()),
        Sequence(2, prompt(5, 2), Sampling(seed=7), 6),
        Sequence(3, prompt(90, 3), Sampling(seed=8, frequency_penalty=1.0), 12, constraint=constraint()),
        Sequence(4, prompt(30, 1), Sampling(temperature=0.0, repetition_penalty=1.3), 4),
    ]


def said(batcher, rows):
    """What the rows say, whatever fails on the way: then all of them stay."""
    tokens = {row.id: [] for row in rows}
    lengths = {row.id: row.max_tokens for row in rows}
    for row in rows:
        batcher.insert([row])

    def note(published):
        for token in published:
            tokens[token.sequence_id].append(token.token)
        return [id for id, length in lengths.items() if len(tokens[id]) >= length]

    for _ in range(500):
        if batcher.is_empty():
            return tokens
        try:
            batcher.remove(note(batcher.decode()))
            batcher.prefill()
        except Fault:
            open_sequences = [id for id, length in lengths.items() if len(tokens[id]) < length]
            batcher.remove(note(batcher.restart(open_sequences)))
            assert batcher.waiting() == {id for id in open_sequences if len(tokens[id]) < lengths[id]}
    raise AssertionError("the batch does not end")


def batch(model, fuse, *, sampler_fails=False, max_running=3, **options):
    class FailingSampler(BatchSampler):
        def __call__(self, *args):
            fuse.burn()
            return super().__call__(*args)

    options["prefix_cache"] = PrefixCache(1 << 30)
    if sampler_fails:
        return Scheduler(model, max_running=max_running, make_sampler=FailingSampler, **options)
    return Scheduler(FailingModel(model, fuse), max_running=max_running, **options)


@pytest.mark.parametrize("sampler_fails", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
def test_rows_say_the_same_wherever_a_step_fails(model, constrained, sampler_fails):
    count = Fuse()
    expected = said(batch(model, count, sampler_fails=sampler_fails), rows(constrained))
    assert [len(tokens) for tokens in expected.values()] == [9, 6, 12, 4]
    making = Fuse()
    batch(model, making, sampler_fails=sampler_fails)  # calls that only making a batch takes
    for n in range(making.calls + 1, count.calls + 1):
        asked = rows(constrained)
        assert said(batch(model, Fuse(n, n + 3, n + 4), sampler_fails=sampler_fails), asked) == expected, n
        for row in asked:
            if row.constraint:
                assert row.constraint.accepted[: row.max_tokens] == expected[row.id], n


def test_rows_that_do_not_stay_are_forgotten_wherever_they_were(model):
    batcher = batch(model, Fuse(), max_running=2)
    asked = rows(False)
    for row in asked:
        batcher.insert([row])
    while len(batcher.decode()) < 2:
        batcher.prefill()
    assert batcher.waiting() == {3, 4}
    batcher.restart([2, 3])
    assert batcher.waiting() == {2, 3}
    told = set()
    for _ in range(30):
        told |= {token.sequence_id for token in batcher.decode()}
        batcher.prefill()
    assert told == {2, 3}


def test_a_restart_gives_back_what_was_computed(model):
    batcher = batch(model, Fuse())
    asked = [Sequence(1, prompt(2000, 1), Sampling(), 5)]
    batcher.insert(asked)
    while not batcher.decode():
        batcher.prefill()
    held = mx.get_active_memory()
    batcher.restart([])
    mx.clear_cache()
    assert batcher.is_empty()
    assert held - mx.get_active_memory() > 2000 * batcher._bytes_per_token * 0.9
