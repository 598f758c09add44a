"""Continuous batching with a real tiny llama: who else is in the batch changes nothing for a row."""

import random

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.requests import Sampling
from mlxserver.engine.scheduler.prefill import ChunkBudget
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import GREEDY, SEEDED, Driver, prompt, row

MANY = 1 << 30


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def run(model, *rows, **options):
    return Driver(Scheduler(model, **options), *rows).finish()


def alone(model, row):
    return run(model, row)[row.id]


def cache(size=MANY):
    return PrefixCache(size)


MIXED = [
    row(1, prompt(1, seed=1)),
    row(2, prompt(2, seed=2), SEEDED),
    row(3, prompt(40, seed=3), GREEDY, 20),
    row(4, prompt(300, seed=4), Sampling(temperature=1.3, top_k=20, seed=5), 15),
    row(5, prompt(17, seed=5), Sampling(temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.2), 12),
    row(6, prompt(5, seed=6), Sampling(seed=-3, min_p=0.1, logit_bias={9: 2.0}), 1),
]


@pytest.mark.parametrize("max_running", [32, 2])
def test_rows_say_the_same_alone_and_together(model, max_running):
    said = run(model, *MIXED, max_running=max_running)
    assert said == {row.id: alone(model, row) for row in MIXED}
    assert [len(said[row.id]) for row in MIXED] == [row.max_tokens for row in MIXED]


def test_greedy_is_what_a_plain_forward_pass_says(model):
    from mlxserver.engine.mlx import mx

    tokens = list(prompt(30))
    for _ in range(6):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    assert alone(model, row(1, prompt(30), max_tokens=6)) == tokens[30:]


def test_rows_join_a_running_batch_and_disturb_nobody(model):
    driver = Driver(Scheduler(model), row(1, prompt(30, seed=1), SEEDED, 40))
    driver.until_said(1, 5)
    driver.add(row(2, prompt(200, seed=2), SEEDED, 10), row(3, prompt(1, seed=3), GREEDY, 10))
    driver.until_said(3)
    assert len(driver.tokens[1]) < 40
    driver.add(row(4, prompt(60, seed=4), GREEDY, 10))
    driver.finish()
    assert driver.tokens == {id: alone(model, driver.rows[id]) for id in (1, 2, 3, 4)}


def test_rows_leave_a_running_batch_and_disturb_nobody(model):
    rows = [row(n, prompt(10 * n, seed=n), SEEDED, 30) for n in (1, 2, 3, 4)]
    driver = Driver(Scheduler(model), *rows)
    driver.until_said(4, 3)
    driver.batcher.remove([2])
    driver.until_said(4, 6)
    driver.batcher.remove([4, 1, 99])
    before = len(driver.tokens[4])
    driver.finish()
    assert driver.tokens[3] == alone(model, rows[2])
    assert len(driver.tokens[4]) == before
    for left in (1, 2, 4):
        assert driver.tokens[left] == alone(model, rows[left - 1])[: len(driver.tokens[left])]


def test_a_row_may_leave_before_its_prompt_is_done_or_even_begun(model):
    batcher = Scheduler(model, max_running=2, stall_target=0.001, prefix_cache=cache())
    batcher._prefill.times.each = 0.1
    driver = Driver(batcher, row(1, prompt(500, seed=1)), row(2, prompt(400, seed=2)), row(3, prompt(9, seed=3)))
    driver.step()
    batcher.remove([3, 1])
    driver.until_said(2, 8)
    assert batcher.is_empty()
    assert driver.tokens == {1: [], 2: alone(model, driver.rows[2]), 3: []}


def test_nothing_is_done_for_an_empty_batch(model):
    batcher = Scheduler(model)
    assert batcher.is_empty()
    assert batcher.decode() == []
    batcher.prefill()
    batcher.remove([1])
    assert batcher.running_step_seconds() == 0


def test_a_batch_that_emptied_takes_rows_again(model):
    batcher = Scheduler(model)
    for _ in range(2):
        assert Driver(batcher, row(1, prompt(20))).finish()[1] == alone(model, row(1, prompt(20)))


def test_short_prompts_pass_a_long_one_which_still_ends(model):
    batcher = Scheduler(model, stall_target=0.001)
    batcher._prefill.times.each = 0.1  # seconds a token, so that chunks are of the smallest size
    driver = Driver(batcher, row(1, prompt(1500, seed=1), GREEDY, 3))
    driver.step()
    driver.add(*(row(n, prompt(10, seed=n), GREEDY, 3) for n in (2, 3, 4)))
    driver.until(lambda: all(len(driver.tokens[n]) == 3 for n in (2, 3, 4)))
    assert driver.tokens[1] == []
    assert driver.finish()[1] == alone(model, driver.rows[1])


def test_a_stream_goes_on_while_a_long_prompt_is_processed(model):
    """The stall target of a millisecond makes many small chunks, and each is followed by a step."""
    driver = Driver(Scheduler(model, stall_target=0.001), row(1, prompt(10, seed=1), GREEDY, 2000))
    driver.until_said(1)
    driver.add(row(2, prompt(1800, seed=2), GREEDY, 1))
    driver.until_said(2)
    assert len(driver.tokens[1]) > 5


def test_a_step_is_measured_while_prompts_are_processed_too(model):
    batcher = Scheduler(model, stall_target=30.0)  # what a step is said to take before there was any
    batcher.insert([row(1, prompt(10, seed=1), GREEDY, 100)])
    batcher.prefill()
    batcher.insert([row(2, prompt(1800, seed=2), GREEDY, 1)])
    for _ in range(30):
        batcher.decode()
        batcher.prefill(ChunkBudget(0.0, 16, 0.1, False))
    assert batcher.has_prompts()
    assert batcher.running_step_seconds() < 30
    batcher.close()


def test_no_more_rows_run_than_may(model):
    driver = Driver(Scheduler(model, max_running=3), *(row(n, prompt(n + 1, seed=n)) for n in range(8)))
    waited = []
    while not driver.batcher.is_empty():
        driver.step()
        waited.append(len(driver.batcher._decoding.rows) + len(driver.batcher._prompts))
    assert max(waited) == 3
    assert driver.tokens == {n: alone(model, driver.rows[n]) for n in range(8)}


def test_a_place_that_comes_free_is_taken_at_once(model):
    driver = Driver(Scheduler(model, max_running=1), row(1, prompt(9, seed=1), GREEDY, 2000), row(2, prompt(9, seed=2)))
    driver.until_said(1, 3)
    assert driver.tokens[2] == []
    driver.batcher.remove([1])
    assert driver.finish()[2] == alone(model, driver.rows[2])


# A conversation: each turn's prompt has the one before, what was answered, and something new.


def turns(model, batcher, count=4, sampling=GREEDY):
    """The prompts and answers of a conversation, and how much of each prompt was cached."""
    tokens, history = prompt(50, seed=1), []
    for n in range(count):
        driver = Driver(batcher, row(n, tokens, sampling, 20))
        said = driver.finish()[n]
        history.append((tokens, said, driver.cached[n]))
        tokens = (*tokens, *said, *prompt(15, seed=n + 2))
    return history


def test_a_growing_conversation_prefills_only_what_is_new(model):
    history = turns(model, Scheduler(model, prefix_cache=cache()))
    before = 0
    for tokens, said, cached in history:
        assert cached == before
        before = len(tokens) + len(said) - 1  # the last token said was never fed


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_prefix_cache_changes_no_answer(model, sampling):
    with_cache = turns(model, Scheduler(model, prefix_cache=cache()), sampling=sampling)
    without = turns(model, Scheduler(model), sampling=sampling)
    assert [said for _, said, _ in with_cache] == [said for _, said, _ in without]
    assert [cached for _, _, cached in without] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("again", "cached"),
    [
        (prompt(60), 59),  # all but the token to feed
        (prompt(60)[:30], 29),
        ((*prompt(60)[:40], 7, 7, 7), 40),
        ((*prompt(60), 5), 60),
        (prompt(60)[:10], 0),  # too short to be worth it
        (prompt(60, seed=9), 0),
        (prompt(60)[:1], 0),
    ],
)
def test_the_longest_common_prefix_is_reused(model, again, cached):
    batcher = Scheduler(model, prefix_cache=cache())
    Driver(batcher, row(1, prompt(60))).finish()
    driver = Driver(batcher, row(2, again))
    assert driver.finish()[2] == alone(model, driver.rows[2])
    assert abs(driver.cached[2] - cached) <= (1 if cached else 0)  # the answer may begin as the prompt goes on


def test_a_prefix_may_be_used_by_several_rows_at_once(model):
    batcher = Scheduler(model, prefix_cache=cache())
    Driver(batcher, row(0, prompt(60))).finish()
    rows = [row(n, (*prompt(60), *prompt(3 * n, seed=n)), SEEDED) for n in (1, 2, 3)]
    driver = Driver(batcher, *rows, row(4, prompt(30, seed=4)))
    assert driver.finish() == {row.id: alone(model, row) for row in driver.rows.values()}
    assert [driver.cached[n] for n in (1, 2, 3, 4)] == [60, 60, 60, 0]


def test_what_a_cancelled_row_had_computed_is_reused(model):
    batcher = Scheduler(model, prefix_cache=cache())
    driver = Driver(batcher, row(1, prompt(60), GREEDY, 2000))
    driver.until_said(1, 5)
    batcher.remove([1])
    again = Driver(batcher, row(2, (*prompt(60), *driver.tokens[1])))
    assert again.finish()[2] == alone(model, again.rows[2])
    assert again.cached[2] == 64


def test_the_prefix_cache_stays_within_its_bytes(model):
    kept = cache()
    Driver(Scheduler(model, prefix_cache=kept), row(1, prompt(100))).finish()
    size = kept.nbytes
    assert size > 0
    bounded = cache(3 * size)
    batcher = Scheduler(model, prefix_cache=bounded)
    for n in range(8):
        Driver(batcher, row(n, prompt(100, seed=n))).finish()
        assert bounded.nbytes <= 3 * size
    for n, cached in ((7, 99), (0, 0)):
        driver = Driver(batcher, row(n, prompt(100, seed=n)))
        driver.finish()
        assert driver.cached[n] == cached


def test_prefixes_can_be_given_back(model):
    kept = cache()
    batcher = Scheduler(model, prefix_cache=kept)
    for n in range(4):
        Driver(batcher, row(n, prompt(100, seed=n))).finish()
    half = kept.nbytes // 2
    batcher.shrink_prefixes(half)
    assert 0 < kept.nbytes <= half
    batcher.shrink_prefixes(0)
    assert kept.nbytes == 0
    driver = Driver(batcher, row(9, prompt(100)))
    assert driver.finish()[9] == alone(model, driver.rows[9])


def test_close_gives_everything_back(model):
    kept = cache()
    batcher = Scheduler(model, prefix_cache=kept, max_running=2)
    driver = Driver(batcher, *(row(n, prompt(50, seed=n), GREEDY, 50) for n in range(4)))
    driver.until_said(0, 3)
    batcher.remove([1])
    batcher.close()
    assert batcher.is_empty()
    assert batcher.decode() == []
    assert kept.nbytes == 0


def test_a_random_traffic_of_joins_and_leaves_changes_no_answer(model):
    """Every row's tokens are the beginning of what it says alone."""
    chance = random.Random(3)
    driver = Driver(Scheduler(model, max_running=4, stall_target=0.002, prefix_cache=cache()))
    for n in range(25):
        start = prompt(chance.choice([1, 20, 90]), seed=chance.randrange(3))
        sampling = chance.choice([GREEDY, SEEDED, Sampling(temperature=0.0, presence_penalty=0.5)])
        driver.add(row(n, (*start, *prompt(chance.randrange(5), seed=n)), sampling, chance.randrange(1, 12)))
        for _ in range(chance.randrange(4)):
            driver.step()
        if chance.random() < 0.3:
            gone = chance.randrange(n + 1)
            driver.batcher.remove([gone])
    driver.finish()
    for n, said in driver.tokens.items():
        assert said == alone(model, driver.rows[n])[: len(said)]


def test_a_chunk_is_longer_where_many_wait_and_few_stream(model):
    batch = Scheduler(model, stall_target=1e6)
    batch.insert([row(1, prompt(4), max_tokens=50)])
    batch.prefill()
    for _ in range(20):  # until it knows how long a step takes
        batch.decode()
    batch._prefill.times.each = batch.running_step_seconds() / 100
    alone = batch.pace().tokens
    batch.insert([row(2, prompt(40))])
    assert batch.pace().tokens == alone
    for id in range(3, 7):
        batch.insert([row(id, prompt(40))])
    assert batch.pace().tokens == pytest.approx(5 * alone, rel=0.01)
    batch.close()


def test_beside_other_models_a_batch_says_the_same(model):
    def said(**options):
        batch, tokens = Scheduler(model, **options), {1: [], 2: []}
        for id, sampling in ((1, GREEDY), (2, SEEDED)):
            batch.insert([row(id, prompt(30, id), sampling, 9)])
        while any(len(ids) < 9 for ids in tokens.values()):
            for token in batch.decode():
                tokens[token.sequence_id].append(token.token)
            batch.prefill()
        batch.close()
        return tokens

    assert said(peer_step_seconds=lambda asking: 0.01) == said()
