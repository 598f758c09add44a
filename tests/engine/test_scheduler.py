"""Continuous batching with a real tiny llama: the rest of the batch changes nothing for a sequence."""

import random

import pytest
from mlx_lm import load

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.metrics import EngineLoad
from mlxserver.engine.scheduler.peers import FixedPeers, ProcessPeers
from mlxserver.engine.scheduler.prefill import ChunkBudget
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import GREEDY, SEEDED, Driver, prompt, sequence, with_chunk_times
from tests.support.prefixes import new_prefixes


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def run(model, *sequences, **options):
    return Driver(Scheduler(model, **options), *sequences).finish()


def alone(model, one):
    return run(model, one)[one.id]


MIXED = [
    sequence(1, prompt(1, seed=1)),
    sequence(2, prompt(2, seed=2), SEEDED),
    sequence(3, prompt(40, seed=3), GREEDY, 20),
    sequence(4, prompt(300, seed=4), SamplingParams(temperature=1.3, top_k=20, seed=5), 15),
    sequence(5, prompt(17, seed=5), SamplingParams(temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.2), 12),
    sequence(6, prompt(5, seed=6), SamplingParams(seed=-3, min_p=0.1, logit_bias={9: 2.0}), 1),
]


@pytest.mark.parametrize("max_running", [32, 2])
def test_sequences_are_the_same_alone_and_together(model, max_running):
    tokens = run(model, *MIXED, max_running=max_running)
    assert tokens == {one.id: alone(model, one) for one in MIXED}
    assert [len(tokens[one.id]) for one in MIXED] == [one.max_tokens for one in MIXED]


@pytest.mark.parametrize("speculation", ["off", "always"])
def test_a_batch_tells_before_it_launches_or_waits_at_every_step_with_streams(model, speculation):
    told = []
    scheduler = Scheduler(model, speculation=speculation)
    scheduler.before_launch = lambda: told.append(True)
    driver = Driver(scheduler, sequence(1, prompt(30) * 2, max_tokens=12), sequence(2, prompt(3, seed=2), SEEDED, 5))
    while not scheduler.is_empty():
        told.clear()
        driver.step()
        assert told


def test_greedy_is_the_argmax_of_a_plain_forward_pass(model):
    from mlxserver.engine.mlx import mx

    tokens = list(prompt(30))
    for _ in range(6):
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    assert alone(model, sequence(1, prompt(30), max_tokens=6)) == tokens[30:]


def test_sequences_join_a_running_batch_and_disturb_no_other(model):
    driver = Driver(Scheduler(model), sequence(1, prompt(30, seed=1), SEEDED, 40))
    driver.until_generated(1, 5)
    driver.add(sequence(2, prompt(200, seed=2), SEEDED, 10), sequence(3, prompt(1, seed=3), GREEDY, 10))
    driver.until_generated(3)
    assert len(driver.tokens[1]) < 40
    driver.add(sequence(4, prompt(60, seed=4), GREEDY, 10))
    driver.finish()
    assert driver.tokens == {id: alone(model, driver.sequences[id]) for id in (1, 2, 3, 4)}


def test_sequences_leave_a_running_batch_and_disturb_no_other(model):
    sequences = [sequence(n, prompt(10 * n, seed=n), SEEDED, 30) for n in (1, 2, 3, 4)]
    driver = Driver(Scheduler(model), *sequences)
    driver.until_generated(4, 3)
    driver.scheduler.remove([2])
    driver.until_generated(4, 6)
    driver.scheduler.remove([4, 1, 99])
    before = len(driver.tokens[4])
    driver.finish()
    assert driver.tokens[3] == alone(model, sequences[2])
    assert len(driver.tokens[4]) == before
    for left in (1, 2, 4):
        assert driver.tokens[left] == alone(model, sequences[left - 1])[: len(driver.tokens[left])]


def test_a_sequence_may_leave_before_its_prompt_is_done_or_even_begun(model):
    scheduler = Scheduler(model, max_running=2, stall_target=0.001, prefixes=new_prefixes())
    scheduler._prefill.times.each = 0.1
    driver = Driver(
        scheduler, sequence(1, prompt(500, seed=1)), sequence(2, prompt(400, seed=2)), sequence(3, prompt(9, seed=3))
    )
    driver.step()
    scheduler.remove([3, 1])
    driver.until_generated(2, 8)
    assert scheduler.is_empty()
    assert driver.tokens == {1: [], 2: alone(model, driver.sequences[2]), 3: []}


def test_nothing_is_done_for_an_empty_batch(model):
    scheduler = Scheduler(model)
    assert scheduler.is_empty()
    assert scheduler.decode() == []
    scheduler.prefill()
    scheduler.remove([1])
    assert scheduler.load.step_seconds == 0


def test_a_batch_that_emptied_takes_sequences_again(model):
    scheduler = Scheduler(model)
    for _ in range(2):
        assert Driver(scheduler, sequence(1, prompt(20))).finish()[1] == alone(model, sequence(1, prompt(20)))


def test_short_prompts_pass_a_long_one_which_still_ends(model):
    scheduler = Scheduler(model, stall_target=0.001)
    with_chunk_times(scheduler._prefill)
    driver = Driver(scheduler, sequence(1, prompt(1500, seed=1), GREEDY, 3))
    driver.step()
    driver.add(*(sequence(n, prompt(10, seed=n), GREEDY, 3) for n in (2, 3, 4)))
    driver.until(lambda: all(len(driver.tokens[n]) == 3 for n in (2, 3, 4)))
    assert driver.tokens[1] == []
    assert driver.finish()[1] == alone(model, driver.sequences[1])


def test_a_stream_goes_on_while_a_long_prompt_is_processed(model):
    """The stall target of a millisecond makes many small chunks, and each is followed by a step."""
    driver = Driver(Scheduler(model, stall_target=0.001), sequence(1, prompt(10, seed=1), GREEDY, 2000))
    driver.until_generated(1, 20)  # a median of steps: a busy machine makes some of them long
    driver.add(sequence(2, prompt(1800, seed=2), GREEDY, 1))
    driver.until_generated(2)
    assert len(driver.tokens[1]) > 5


def test_a_step_is_measured_while_prompts_are_processed_too(model):
    scheduler = Scheduler(model, stall_target=30.0)  # assumed until a step is measured
    scheduler.insert([sequence(1, prompt(10, seed=1), GREEDY, 100)])
    scheduler.prefill()
    scheduler.insert([sequence(2, prompt(1800, seed=2), GREEDY, 1)])
    for _ in range(30):
        scheduler.decode()
        scheduler.prefill(ChunkBudget(0.0, 16, 0.1, False))
    assert scheduler.has_prompts()
    assert scheduler.load.step_seconds < 30
    scheduler.close()


def test_no_more_sequences_run_than_may(model):
    driver = Driver(Scheduler(model, max_running=3), *(sequence(n, prompt(n + 1, seed=n)) for n in range(8)))
    running = []
    while not driver.scheduler.is_empty():
        driver.step()
        running.append(len(driver.scheduler._running.sequences) + len(driver.scheduler._admission.prefilling))
    assert max(running) == 3
    assert driver.tokens == {n: alone(model, driver.sequences[n]) for n in range(8)}


def test_a_slot_that_comes_free_is_taken_at_once(model):
    driver = Driver(
        Scheduler(model, max_running=1), sequence(1, prompt(9, seed=1), GREEDY, 2000), sequence(2, prompt(9, seed=2))
    )
    driver.until_generated(1, 3)
    assert driver.tokens[2] == []
    driver.scheduler.remove([1])
    assert driver.finish()[2] == alone(model, driver.sequences[2])


# A conversation: each turn's prompt has the one before, the answer to it, and something new.


def turns(model, scheduler, count=4, sampling=GREEDY):
    """The prompts and answers of a conversation, and how much of each prompt was cached."""
    tokens, history = prompt(50, seed=1), []
    for n in range(count):
        driver = Driver(scheduler, sequence(n, tokens, sampling, 20))
        answer = driver.finish()[n]
        history.append((tokens, answer, driver.cached[n]))
        tokens = (*tokens, *answer, *prompt(15, seed=n + 2))
    return history


def test_a_growing_conversation_prefills_only_what_is_new(model):
    history = turns(model, Scheduler(model, prefixes=new_prefixes()))
    before = 0
    for tokens, answer, cached in history:
        assert cached == before
        before = len(tokens) + len(answer) - 1  # the last token generated was never fed


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_prefix_cache_changes_no_answer(model, sampling):
    with_cache = turns(model, Scheduler(model, prefixes=new_prefixes()), sampling=sampling)
    without = turns(model, Scheduler(model), sampling=sampling)
    assert [answer for _, answer, _ in with_cache] == [answer for _, answer, _ in without]
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
    scheduler = Scheduler(model, prefixes=new_prefixes())
    Driver(scheduler, sequence(1, prompt(60))).finish()
    driver = Driver(scheduler, sequence(2, again))
    assert driver.finish()[2] == alone(model, driver.sequences[2])
    assert abs(driver.cached[2] - cached) <= (1 if cached else 0)  # the answer may begin as the prompt goes on


def test_a_prefix_may_be_used_by_several_sequences_at_once(model):
    scheduler = Scheduler(model, prefixes=new_prefixes())
    Driver(scheduler, sequence(0, prompt(60))).finish()
    sequences = [sequence(n, (*prompt(60), *prompt(3 * n, seed=n)), SEEDED) for n in (1, 2, 3)]
    driver = Driver(scheduler, *sequences, sequence(4, prompt(30, seed=4)))
    assert driver.finish() == {one.id: alone(model, one) for one in driver.sequences.values()}
    assert [driver.cached[n] for n in (1, 2, 3, 4)] == [60, 60, 60, 0]


def test_the_kv_cache_of_a_cancelled_sequence_is_reused(model):
    scheduler = Scheduler(model, prefixes=new_prefixes())
    driver = Driver(scheduler, sequence(1, prompt(60), GREEDY, 2000))
    driver.until_generated(1, 5)
    scheduler.remove([1])
    again = Driver(scheduler, sequence(2, (*prompt(60), *driver.tokens[1])))
    assert again.finish()[2] == alone(model, again.sequences[2])
    assert again.cached[2] == 64


def test_the_prefix_cache_stays_within_its_bytes(model):
    prefixes = new_prefixes()
    Driver(Scheduler(model, prefixes=prefixes), sequence(1, prompt(100))).finish()
    size = prefixes.nbytes
    assert size > 0
    bounded = new_prefixes(3 * size)
    scheduler = Scheduler(model, prefixes=bounded)
    for n in range(8):
        Driver(scheduler, sequence(n, prompt(100, seed=n))).finish()
        assert bounded.nbytes <= 3 * size
    for n, cached in ((7, 99), (0, 0)):
        driver = Driver(scheduler, sequence(n, prompt(100, seed=n)))
        driver.finish()
        assert driver.cached[n] == cached


def test_prefixes_can_be_given_back(model):
    prefixes = new_prefixes()
    scheduler = Scheduler(model, prefixes=prefixes)
    for n in range(4):
        Driver(scheduler, sequence(n, prompt(100, seed=n))).finish()
    half = prefixes.nbytes // 2
    scheduler.shrink_prefixes(half)
    assert 0 < prefixes.nbytes <= half
    scheduler.shrink_prefixes(0)
    assert prefixes.nbytes == 0
    driver = Driver(scheduler, sequence(9, prompt(100)))
    assert driver.finish()[9] == alone(model, driver.sequences[9])


def test_close_gives_everything_back(model):
    prefixes = new_prefixes()
    scheduler = Scheduler(model, prefixes=prefixes, max_running=2)
    driver = Driver(scheduler, *(sequence(n, prompt(50, seed=n), GREEDY, 50) for n in range(4)))
    driver.until_generated(0, 3)
    scheduler.remove([1])
    scheduler.close()
    assert scheduler.is_empty()
    assert scheduler.decode() == []
    assert prefixes.nbytes == 0


def test_a_random_traffic_of_joins_and_leaves_changes_no_answer(model):
    """Every sequence's tokens are the beginning of those it has alone."""
    chance = random.Random(3)
    driver = Driver(Scheduler(model, max_running=4, stall_target=0.002, prefixes=new_prefixes()))
    for n in range(25):
        start = prompt(chance.choice([1, 20, 90]), seed=chance.randrange(3))
        sampling = chance.choice([GREEDY, SEEDED, SamplingParams(temperature=0.0, presence_penalty=0.5)])
        driver.add(sequence(n, (*start, *prompt(chance.randrange(5), seed=n)), sampling, chance.randrange(1, 12)))
        for _ in range(chance.randrange(4)):
            driver.step()
        if chance.random() < 0.3:
            gone = chance.randrange(n + 1)
            driver.scheduler.remove([gone])
    driver.finish()
    for n, tokens in driver.tokens.items():
        assert tokens == alone(model, driver.sequences[n])[: len(tokens)]


def test_a_chunk_takes_a_frame_s_time_however_short_the_steps(model):
    batch = Scheduler(model, stall_target=1e6)
    batch._prefill.times.each = 1e-5
    assert batch._prefill.budget(1e-4, 0.0).tokens == 1600
    batch.close()


def test_a_chunk_is_longer_where_many_wait_and_few_run(model, monkeypatch):
    monkeypatch.setattr("mlxserver.engine.scheduler.prefill._LEAST_SECONDS", 0.0)  # the steps are short here
    batch = Scheduler(model, stall_target=1e6)
    batch.insert([sequence(1, prompt(4), max_tokens=50)])
    batch.prefill()
    for _ in range(20):  # until it knows how long a step takes
        batch.decode()
    batch._prefill.times.each = batch.load.step_seconds / 100
    alone = batch.chunk_budget().tokens
    batch.insert([sequence(2, prompt(40))])
    assert batch.chunk_budget().tokens == alone
    for id in range(3, 7):
        batch.insert([sequence(id, prompt(40))])
    assert batch.chunk_budget().tokens == pytest.approx(5 * alone, rel=0.01)
    batch.close()


def test_beside_streams_of_other_models_the_tokens_are_the_same(model):
    def generate(**options):
        batch, tokens = Scheduler(model, **options), {1: [], 2: []}
        for id, sampling in ((1, GREEDY), (2, SEEDED)):
            batch.insert([sequence(id, prompt(30, id), sampling, 9)])
        while any(len(ids) < 9 for ids in tokens.values()):
            for token in batch.decode():
                tokens[token.sequence_id].append(token.token)
            batch.prefill()
        batch.close()
        return tokens

    assert generate(peers=FixedPeers(0.01)) == generate()


def test_the_load_counts_requests_with_a_slot_however_many_sequences_they_have(model):
    scheduler = Scheduler(model, max_running=3)
    driver = Driver(scheduler)
    driver.add_choices(*(sequence(n, prompt(20), SamplingParams(seed=n), 4 + 4 * n) for n in (1, 2)))
    driver.add_choices(*(sequence(n, prompt(30), SamplingParams(seed=n), 4) for n in (3, 4)))
    assert (scheduler.load.is_busy, scheduler.load.num_running) == (True, 0)
    driver.step()
    assert scheduler.load.num_running == 1  # the other one's choices need two slots
    driver.until(lambda: scheduler.waiting() == set())
    assert scheduler.load.num_running == 2 - (len(driver.tokens[2]) == 12)
    driver.finish()
    assert (scheduler.load.is_busy, scheduler.load.num_running, scheduler.load.step_seconds) == (False, 0, 0.0)


def test_a_request_held_back_by_kv_cache_or_preempted_does_not_count_as_running(model):
    scheduler = Scheduler(model, max_kv_tokens=1300)
    driver = Driver(
        scheduler, sequence(0, prompt(300), max_tokens=300), sequence(1, prompt(250, seed=1), max_tokens=300)
    )
    driver.add(sequence(2, prompt(900, seed=2), max_tokens=300))
    driver.until_generated(1)
    assert (scheduler.waiting(), scheduler.load.num_running) == ({2}, 2)
    driver.until(lambda: 1 in scheduler.waiting())
    assert scheduler.load.num_running == 1
    scheduler.close()
    assert (scheduler.load.is_busy, scheduler.load.num_running, scheduler.load.step_seconds) == (False, 0, 0.0)


class CountingPeers(FixedPeers):
    """Peers that count how often they are asked."""

    asked = 0

    def observe(self, own):
        self.asked += 1
        return super().observe(own)


def test_peers_are_observed_once_per_step(model):
    peers = CountingPeers()
    driver = Driver(Scheduler(model, peers=peers), sequence(1, prompt(40)))
    for _ in range(5):
        driver.step()
    assert peers.asked == 5


def test_the_models_of_a_process_know_each_other_by_their_loads():
    peers, loads = ProcessPeers(), [EngineLoad(), EngineLoad(True, 1, 0.04), EngineLoad(True, 1, 0.03)]
    for own in loads:
        peers.add(own)
    assert [peers.observe(own) for own in loads] == [0.03, 0.03, 0.04]
    del own
    loads.pop()
    assert peers.observe(loads[0]) == 0.04
    assert peers.observe(loads[1]) == 0.0
