"""What speculation gains and loses on a GPU whose plain steps take 2.1 ms, replayed without a model."""

import random

import pytest

from benchmarks.speculation import Task
from benchmarks.speculation_replay import Server, Times

# In plain steps, of a model of 1B on an H200: a step is the host's, and a break of the pipeline costs most of one.
FAST = Times({4: 1.43, 8: 1.43, 16: 1.5}, broken=0.7, noise=0.1)
DEAR = Times({4: 2.5, 8: 2.6, 16: 2.8}, broken=2.0, noise=0.1)
UNBROKEN = Times({4: 1.8, 8: 2.7, 16: 4.6}, broken=0.0, noise=0.3)  # a CPU


def prose(length, seed):
    """Tokens as frequent as words are, in which phrases recur that then go on otherwise."""
    rng, tokens = random.Random(seed), []
    weights = [1 / (rank + 3) for rank in range(3000)]
    phrases = [rng.choices(range(3000), weights, k=rng.randrange(3, 7)) for _ in range(12)]
    while len(tokens) < length:
        tokens += rng.choice(phrases) if rng.random() < 0.2 else rng.choices(range(3000), weights, k=3)
    return tuple(tokens[:length])


def free_text(length, seed):
    tokens = prose(256 + length, seed)
    return Task(tokens[:256], tokens[256:])


def edit(length, seed):
    file = prose(length, seed)
    return Task((*file, 7, 8, 9), (*file[: length // 2], 5000, 5001, *file[length // 2 + 2 :]))


@pytest.mark.parametrize("times", [FAST, DEAR, UNBROKEN], ids=["fast", "dear", "unbroken"])
@pytest.mark.parametrize("length", [64, 512])
def test_free_text_loses_next_to_nothing_behind_edits_and_alone(times, length):
    server, gains = Server(times, seed=1), []
    for seed in range(12):
        server.gain(edit(600, seed))
        gains += [server.gain(free_text(length, 100 * seed + n)) for n in range(4)]
    alone = Server(times, seed=2)
    gains += [alone.gain(free_text(length, seed)) for seed in range(20)]
    assert sum(gains) / len(gains) > 0.98
    assert sorted(gains)[len(gains) // 10] > 0.96


@pytest.mark.parametrize(
    ("times", "least"), [(FAST, 6.0), (DEAR, 3.0), (UNBROKEN, 2.5)], ids=["fast", "dear", "unbroken"]
)
def test_edits_gain_what_they_did_beside_free_text(times, least):
    server, gains = Server(times, seed=1), []
    for seed in range(6):
        gains.append(server.gain(edit(600, seed)))
        for n in range(4):
            server.gain(free_text(256, 100 * seed + n))
    assert sum(gains[1:]) / len(gains[1:]) > least
