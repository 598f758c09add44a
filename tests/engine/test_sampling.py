"""The batched sampler against a plain reference; a sequence's draw does not depend on the rest of the batch.

Where a kernel draws, MLX's functions do so in further runs of the tests that concern draws.
"""

from dataclasses import replace

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform.policy import current
from mlxserver.engine.sampling.draw import CANDIDATES
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.sequence import Sequence

GREEDY = SamplingParams(temperature=0.0)
LOGITS = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 1.9]
VOCAB = len(LOGITS)
SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.3),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.95),
    SamplingParams(min_p=0.3),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=1.7, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(logit_bias={3: 5.0, 0: -100.0}),
    SamplingParams(top_p=0.6, logit_bias={4: 3.0}),
]
POLICIES = pytest.mark.parametrize(
    "policy",
    [replace(current(), sampling_kernel=is_kernel) for is_kernel in sorted({False, current().sampling_kernel})],
    ids=lambda policy: "kernel" if policy.sampling_kernel else "arrays",
)


def distribution(logits, sampling):
    """The reference: each token's probability, one filter after the other, in float64."""
    logits = np.array(logits, dtype=np.float64)
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = (before < sampling.top_p) & (np.arange(len(order)) < (sampling.top_k or len(order)))
    kept &= probabilities[order] >= sampling.min_p * probabilities.max()
    filtered = np.zeros_like(probabilities)
    filtered[order[kept]] = probabilities[order[kept]]
    return filtered / filtered.sum()


def seeded(sampling, seed):
    return replace(sampling, seed=seed)


def make(*samplings, vocab=VOCAB, tokens=(0,), policy=None):
    sampler = BatchSampler(vocab, policy)
    sampler.extend(sequences(*samplings, tokens=tokens))
    return sampler


def sequences(*samplings, tokens=(0,)):
    return [Sequence(n, tokens, sampling, 100) for n, sampling in enumerate(samplings)]


def sample(sampler, logits=LOGITS):
    """One step; the same logits for each sequence unless there are some for each."""
    array = mx.array(logits)
    return sampler(array if array.ndim == 2 else mx.tile(array, (len(sampler._settings), 1))).tolist()


def draws(sampler, index, steps=30, logits=LOGITS):
    return [sample(sampler, logits)[index] for _ in range(steps)]


def test_greedy_is_the_argmax_of_each_sequence():
    logits = np.random.default_rng(0).normal(size=(5, 40)).tolist()
    assert sample(make(*[GREEDY] * 5, vocab=40), logits) == np.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_logits_may_be_of_any_float_type(dtype):
    sampler = make(GREEDY, SamplingParams(top_k=1))
    assert sampler(mx.array([LOGITS, LOGITS], dtype=dtype)).tolist() == [0, 0]


@POLICIES
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution(sampling, policy):
    """Over 4,000 seeds: no token that is filtered out, and each other's frequency within five standard errors."""
    count = 4000
    drawn = sample(make(*[seeded(sampling, seed) for seed in range(count)], policy=policy))
    expected = distribution(LOGITS, sampling)
    frequency = np.bincount(drawn, minlength=len(LOGITS)) / count
    assert not frequency[expected == 0].any()
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_draws_of_one_sequence_follow_the_distribution_over_its_steps():
    drawn = draws(make(SamplingParams(seed=5)), 0, steps=2000)
    expected = distribution(LOGITS, SamplingParams())
    frequency = np.bincount(drawn, minlength=len(LOGITS)) / 2000
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / 2000)).all()


@POLICIES
@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_k=40), SamplingParams(top_p=0.2), SamplingParams(min_p=0.4)], ids=str
)
def test_filters_are_exact_in_a_large_vocabulary(sampling, policy):
    logits = np.random.default_rng(1).normal(size=3000).astype(np.float32).tolist()
    expected = distribution(logits, sampling)
    drawn = sample(make(*[seeded(sampling, seed) for seed in range(200)], vocab=3000, policy=policy), logits)
    assert expected[drawn].min() > 0


@POLICIES
def test_a_top_k_beyond_the_candidates_is_honoured(policy):
    drawn = sample(
        make(*[SamplingParams(top_k=300, seed=n) for n in range(500)], vocab=2000, policy=policy),
        list(range(2000, 0, -1)),
    )
    assert max(drawn) < 300
    flat = [1.0 - 1e-4 * n for n in range(2000)]
    assert (
        max(sample(make(*[SamplingParams(top_k=300, seed=n) for n in range(500)], vocab=2000, policy=policy), flat))
        < 300
    )


@POLICIES
@pytest.mark.parametrize("top_k", [len(LOGITS), 10**12])
def test_a_top_k_as_large_as_the_vocabulary_keeps_all(top_k, policy):
    alone = draws(make(SamplingParams(seed=3), policy=policy), 0)
    assert draws(make(SamplingParams(seed=3, top_k=top_k), policy=policy), 0) == alone


def test_the_same_seed_draws_the_same_and_another_draws_otherwise():
    assert draws(make(SamplingParams(seed=7)), 0) == draws(make(SamplingParams(seed=7)), 0)
    assert draws(make(SamplingParams(seed=7)), 0) != draws(make(SamplingParams(seed=8)), 0)
    assert draws(make(SamplingParams()), 0) != draws(make(SamplingParams()), 0)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**32, 1])
def test_any_64_bit_seed_is_its_own(seed):
    others = {tuple(draws(make(SamplingParams(seed=other)), 0)) for other in (5, 2**40)}
    assert tuple(draws(make(SamplingParams(seed=seed)), 0)) not in others


@POLICIES
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=7),
        SamplingParams(seed=7, top_p=0.8),
        SamplingParams(seed=7, min_p=0.05, temperature=1.5),
        SamplingParams(seed=7, frequency_penalty=0.5, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_a_sequence_draws_the_same_alone_and_in_any_company_and_position(sampling, policy):
    alone = draws(make(sampling, policy=policy), 0)
    for neighbours in SETTINGS, [GREEDY], [SamplingParams(presence_penalty=1.0, seed=1), SamplingParams(top_k=4)]:
        for position in (0, len(neighbours)):
            company = [*neighbours[:position], sampling, *neighbours[position:]]
            assert draws(make(*company, policy=policy), position) == alone


@POLICIES
def test_a_wide_nucleus_does_not_depend_on_the_top_k_of_a_neighbour(policy):
    """A nucleus of more than CANDIDATES tokens keeps the whole tail, whatever the neighbours ask for."""
    flat = [1.0 - 1e-5 * n for n in range(8 * CANDIDATES)]
    wide = SamplingParams(top_p=0.5, seed=3)
    alone = draws(make(wide, vocab=len(flat), policy=policy), 0, logits=flat)
    both = make(wide, SamplingParams(top_k=5 * CANDIDATES), vocab=len(flat), policy=policy)
    assert draws(both, 0, logits=flat) == alone


def test_joining_and_leaving_sequences_do_not_disturb_a_draw():
    alone = draws(make(SamplingParams(seed=7)), 0, steps=12)
    sampler = make(GREEDY, SamplingParams(seed=7), SamplingParams(top_p=0.5))
    drawn = draws(sampler, 1, steps=3)
    sampler.extend(sequences(SamplingParams(top_k=2), SamplingParams(presence_penalty=1.0)))
    drawn += draws(sampler, 1, steps=3)
    sampler.filter([4, 1])
    drawn += draws(sampler, 1, steps=3)
    sampler.filter([1])
    drawn += draws(sampler, 0, steps=3)
    assert drawn == alone


def test_a_sequence_that_joins_starts_its_own_stream_from_the_beginning():
    sampler = make(SamplingParams(seed=1))
    draws(sampler, 0, steps=5)
    sampler.extend(sequences(SamplingParams(seed=7)))
    assert draws(sampler, 1) == draws(make(SamplingParams(seed=7)), 0)


def test_a_plain_sequence_is_not_touched_by_its_neighbours_penalties_and_bias():
    neighbours = [
        SamplingParams(temperature=0, logit_bias={0: -100}),
        SamplingParams(temperature=0, frequency_penalty=2.0),
    ]
    sampler = make(GREEDY, *neighbours)
    tokens = [sample(sampler) for _ in range(4)]
    assert [step[0] for step in tokens] == [0, 0, 0, 0]
    assert [step[1] for step in tokens] == [7, 7, 7, 7]
    assert [step[2] for step in tokens] == [0, 7, 1, 2]


class Reference:
    """Greedy decoding with penalties, one token at a time."""

    def __init__(self, sampling, prompt):
        self.sampling, self.prompt, self.generated = sampling, set(prompt), {}

    def next(self, logits):
        logits = np.array(logits, dtype=np.float64)
        for token in self.prompt | self.generated.keys():
            factor = self.sampling.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token, count in self.generated.items():
            logits[token] -= count * self.sampling.frequency_penalty + self.sampling.presence_penalty
        token = int(np.argmax(logits))
        self.generated[token] = self.generated.get(token, 0) + 1
        return token


PENALTIES = [
    SamplingParams(temperature=0, frequency_penalty=0.4),
    SamplingParams(temperature=0, presence_penalty=1.1),
    SamplingParams(temperature=0, repetition_penalty=1.5),
    SamplingParams(temperature=0, frequency_penalty=-0.3, presence_penalty=0.2, repetition_penalty=1.2),
    GREEDY,
]


def steps(count):
    return np.random.default_rng(4).normal(size=(count, len(LOGITS))).tolist()


def test_penalties_follow_the_reference_alone_and_together():
    prompt = (1, 3)
    for company in [[one] for one in PENALTIES] + [PENALTIES]:
        sampler = make(*company, tokens=prompt)
        references = [Reference(sampling, prompt) for sampling in company]
        for logits in steps(20):
            assert sample(sampler, logits) == [reference.next(logits) for reference in references]


def test_penalties_follow_the_reference_while_sequences_join_and_leave():
    prompt, logits = (2,), iter(steps(30))
    sampler = make(GREEDY, PENALTIES[0], tokens=prompt)
    references = [Reference(sampling, prompt) for sampling in (GREEDY, PENALTIES[0])]

    def check():
        for _ in range(5):
            step = next(logits)
            assert sample(sampler, step) == [reference.next(step) for reference in references]

    check()
    sampler.extend(sequences(PENALTIES[2], PENALTIES[3], tokens=(5, 6)))
    references += [Reference(sampling, (5, 6)) for sampling in PENALTIES[2:4]]
    check()
    for keep in [3, 0, 1], [1], [0]:
        sampler.filter(keep)
        references = [references[index] for index in keep]
        check()
    sampler.extend(sequences(PENALTIES[1], tokens=prompt))
    references.append(Reference(PENALTIES[1], prompt))
    check()


def test_a_penalty_that_joins_later_starts_without_a_past():
    sampler = make(GREEDY)
    assert draws(sampler, 0, steps=3) == [0, 0, 0]
    sampler.extend(sequences(SamplingParams(temperature=0, presence_penalty=1.5)))
    assert [sample(sampler) for _ in range(3)] == [[0, 0], [0, 7], [0, 1]]


def test_bias_follows_its_sequence_through_joins_and_leaves():
    sampler = make(SamplingParams(temperature=0, logit_bias={4: 9.0}))
    sampler.extend(sequences(GREEDY, SamplingParams(temperature=0, logit_bias={6: 9.0})))
    assert sample(sampler) == [4, 0, 6]
    sampler.filter([2, 1])
    assert sample(sampler) == [6, 0]
    sampler.filter([1])
    assert sample(sampler) == [0]


@POLICIES
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-30, 1e-6])
def test_a_temperature_next_to_nothing_is_greedy(temperature, policy):
    logits = [-1.0, 0.0, 2.0, 1.0]
    assert sample(make(SamplingParams(temperature=temperature, seed=1), vocab=4, policy=policy), logits) == [2]


@POLICIES
def test_tokens_that_are_impossible_are_never_drawn(policy):
    masked = [-float("inf"), 0.0, -float("inf"), 0.0]
    settings = [SamplingParams(seed=n, top_p=0.99 if n % 2 else 1.0) for n in range(300)]
    assert set(sample(make(*settings, vocab=4, policy=policy), masked)) == {1, 3}


@POLICIES
def test_tokens_that_are_impossible_are_never_drawn_from_a_large_vocabulary(policy):
    """A GPU adds up in parallel there, so that its sums may rise by a rounding error where they should not."""
    chance = np.random.default_rng(0)
    logits = np.where(chance.random((64, 50_000)) < 0.01, chance.normal(size=(64, 50_000)), -np.inf)
    sampler = make(*[SamplingParams(seed=n) for n in range(64)], vocab=50_000, policy=policy)
    for _ in range(5):
        drawn = sampler(mx.array(logits, dtype=mx.float32)).tolist()
        assert np.isfinite(logits[np.arange(64), drawn]).all()


@POLICIES
@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 0.0])
@pytest.mark.parametrize("penalty", [1.0, 1e-300, 1e300])
def test_whatever_the_logits_are_the_token_exists_and_the_neighbours_are_spared(logit, penalty, policy):
    """A token that does not exist would be written beyond the end of the counts, and read beyond the embeddings."""
    settings = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3, min_p=0.1), GREEDY]
    wild = [replace(s, repetition_penalty=penalty) for s in settings]
    tame = SamplingParams(seed=7, top_p=0.9)
    alone = draws(make(tame, policy=policy), 0, steps=4)
    sampler = make(*wild, tame, tokens=(0, 1), policy=policy)
    logits = [*([[logit] * (VOCAB - 1) + [1.0]] * len(wild)), LOGITS]
    drawn = [sample(sampler, logits) for _ in range(4)]
    assert all(0 <= token < VOCAB for step in drawn for token in step)
    assert [step[-1] for step in drawn] == alone


def test_a_batch_that_emptied_takes_sequences_again():
    sampler = make(SamplingParams(seed=1, presence_penalty=1.0, logit_bias={1: 1.0}))
    sampler.filter([])
    sampler.extend(sequences(GREEDY))
    assert sample(sampler) == [0]


@pytest.mark.parametrize(
    "sampling", [*SETTINGS, SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2)], ids=str
)
def test_draws_that_were_taken_back_are_drawn_again(sampling):
    """Sequences keep unlike numbers of the last draws, and go on with those that they had without the others."""
    samplings = [seeded(sampling, seed) for seed in (1, 2, 3)] + [GREEDY]
    plain, rewound = make(*samplings), make(*samplings)
    expected = [sample(plain) for _ in range(9)]
    drawn = [sample(rewound) for _ in range(4)]
    kept = [1, 4, 2, 3]
    rewound.rewind(mx.array(drawn, dtype=mx.uint32).T, kept)
    again = [sample(rewound) for _ in range(5)]
    for row, count in enumerate(kept):
        assert [step[row] for step in drawn[:count]] == [step[row] for step in expected[:count]]
        assert [step[row] for step in again] == [step[row] for step in expected[count : count + 5]]


@POLICIES
@pytest.mark.parametrize("sampling", [*SETTINGS, SamplingParams(frequency_penalty=0.5), GREEDY], ids=str)
def test_several_positions_at_once_are_what_single_ones_are(sampling, policy):
    """Among greedy sequences, with steps alone before and behind them, and a mask that holds for the first position."""
    samplings = [seeded(sampling, 1), GREEDY, seeded(sampling, 2)]
    alone, together = make(*samplings, policy=policy), make(*samplings, policy=policy)
    logits = mx.array(np.random.default_rng(5).normal(size=(3, 7, VOCAB)), dtype=mx.float32)
    allowed = mx.array([[0b11110000], [0b00001111], [0b11111111]], dtype=mx.uint8)
    for mask in (None, allowed, None):
        expected = [alone(logits[:, n], None if n else mask).tolist() for n in range(7)]
        assert together(logits, mask).T.tolist() == expected
        assert together(logits[:, 0]).tolist() == alone(logits[:, 0]).tolist()
