"""A real batch after a call that failed: the sequences that stay resume where they were, with the same tokens."""

import random

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache.caches import bytes_per_token
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.sequence import Sequence
from tests.support.grammars import Even
from tests.support.prefixes import new_prefixes


class Fault(Exception):
    """The fault of a call."""


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


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def prompt(length, seed):
    return tuple(random.Random(seed).choices(range(2, 300), k=length))


def sequences(constrained):
    constraint = Even if constrained else lambda: None
    return [
        Sequence(1, prompt(30, 1), SamplingParams(temperature=0.0), 9, constraint=constraint()),
        Sequence(2, prompt(5, 2), SamplingParams(seed=7), 6),
        Sequence(3, prompt(90, 3), SamplingParams(seed=8, frequency_penalty=1.0), 12, constraint=constraint()),
        Sequence(4, prompt(30, 1), SamplingParams(temperature=0.0, repetition_penalty=1.3), 4),
    ]


def generate(scheduler, sequences):
    """The tokens of the sequences, all of which stay when a call fails."""
    tokens = {sequence.id: [] for sequence in sequences}
    lengths = {sequence.id: sequence.max_tokens for sequence in sequences}
    for sequence in sequences:
        scheduler.insert([sequence])

    def note(published):
        for token in published:
            tokens[token.sequence_id].append(token.token)
        return [id for id, length in lengths.items() if len(tokens[id]) >= length]

    for _ in range(500):
        if scheduler.is_empty():
            return tokens
        try:
            scheduler.remove(note(scheduler.decode()))
            scheduler.prefill()
        except Fault:
            open_sequences = [id for id, length in lengths.items() if len(tokens[id]) < length]
            scheduler.remove(note(scheduler.restart(open_sequences)))
            assert scheduler.waiting() == {id for id in open_sequences if len(tokens[id]) < lengths[id]}
    raise AssertionError("the batch does not end")


def batch(model, fuse, *, sampler_fails=False, max_running=3, **options):
    class FailingSampler(BatchSampler):
        def __call__(self, *args):
            fuse.burn()
            return super().__call__(*args)

    options["prefixes"] = new_prefixes()
    if sampler_fails:
        return Scheduler(model, max_running=max_running, make_sampler=FailingSampler, **options)
    return Scheduler(FailingModel(model, fuse), max_running=max_running, **options)


@pytest.mark.parametrize("sampler_fails", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
def test_the_tokens_are_the_same_wherever_a_step_fails(model, constrained, sampler_fails):
    count = Fuse()
    expected = generate(batch(model, count, sampler_fails=sampler_fails), sequences(constrained))
    assert [len(tokens) for tokens in expected.values()] == [9, 6, 12, 4]
    making = Fuse()
    batch(model, making, sampler_fails=sampler_fails)  # calls that only making a batch takes
    for n in range(making.calls + 1, count.calls + 1):
        asked = sequences(constrained)
        assert generate(batch(model, Fuse(n, n + 3, n + 4), sampler_fails=sampler_fails), asked) == expected, n
        for sequence in asked:
            if sequence.constraint:
                assert sequence.constraint.accepted[: sequence.max_tokens] == expected[sequence.id], n


def test_sequences_that_do_not_stay_are_removed_wherever_they_were(model):
    scheduler = batch(model, Fuse(), max_running=2)
    asked = sequences(False)
    for sequence in asked:
        scheduler.insert([sequence])
    while len(scheduler.decode()) < 2:
        scheduler.prefill()
    assert scheduler.waiting() == {3, 4}
    scheduler.restart([2, 3])
    assert scheduler.waiting() == {2, 3}
    advanced = set()
    for _ in range(30):
        advanced |= {token.sequence_id for token in scheduler.decode()}
        scheduler.prefill()
    assert advanced == {2, 3}


def test_a_restart_frees_the_kv_cache(model):
    scheduler = batch(model, Fuse())
    asked = [Sequence(1, prompt(2000, 1), SamplingParams(), 5)]
    scheduler.insert(asked)
    while not scheduler.decode():
        scheduler.prefill()
    held = mx.get_active_memory()
    scheduler.restart([])
    mx.clear_cache()
    assert scheduler.is_empty()
    assert held - mx.get_active_memory() > 2000 * bytes_per_token(model) * 0.9
