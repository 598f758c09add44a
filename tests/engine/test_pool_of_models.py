"""Two models in one pool: their texts are those without a limit, and no more is held than the limit."""

import pytest
from mlx_lm import load

from mlxserver.engine.kv_cache.caches import cache_sizes
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.kv_claims import Outlook
from mlxserver.engine.kv_pool import KVPool, Reserved
from mlxserver.engine.scheduler.kv_budget import block_bytes
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import Driver, prompt, sequence

ANSWER = 400  # tokens


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


class Pool:
    """A pool of so many tokens beside reservations of 512 tokens each, and a manager without idle models."""

    def __init__(self, model, tokens, keys="ab"):
        tier = RamTier()
        self.pool = KVPool(tier, wait_seconds=0.0)
        self.prefix_cache = PrefixCache(tier, pool=self.pool)
        sizes = cache_sizes(model)
        self._floor = block_bytes(sizes, 512, 1)
        self._model = model
        self.keys = keys
        self.limit = len(keys) * self._floor + block_bytes(sizes, tokens, 1)
        self.publish()

    def publish(self, leaving="", evicted=""):
        reserved = {key: Reserved(self._floor, is_leaving=key in leaving) for key in self.keys if key not in evicted}
        self.fixed = len(reserved) * self._floor
        self.pool.publish(self.limit, self.fixed, reserved)

    def scheduler(self, key, prefixes=False):
        opened = self.prefix_cache.open(ModelIdentity(key), 1 << 30, key) if prefixes else None
        return Scheduler(self._model, account=self.pool.open(key, self._floor), prefixes=opened)

    def answer(self):
        for account, claim in self.pool.waiting:
            self.pool.set_outlook(account, claim, Outlook.LATER)

    @property
    def held(self):
        return self.fixed + self.pool.total_over + self.pool.prefix_bytes


def sequences(first, count=4):
    return [sequence(n, prompt(120 + 40 * (n % 4), seed=n), max_tokens=ANSWER) for n in range(first, first + count)]


def finish(pool, *drivers):
    """Run all to their end; the most that was held, and which sequences had to wait again."""
    most, preempted = 0, set()
    for _ in range(20_000):
        if all(driver.scheduler.is_empty() for driver in drivers):
            return most, preempted
        for driver in drivers:
            began = {id for id, tokens in driver.tokens.items() if tokens}
            driver.step()
            preempted |= began & driver.scheduler.waiting()
            pool.answer()
            most = max(most, pool.held)
    raise AssertionError("the models do not end")


@pytest.mark.parametrize("prefixes", [False, True])
def test_two_models_that_outgrow_the_pool_say_what_they_would_say_without_a_limit(model, prefixes):
    free = Driver(Scheduler(model), *sequences(0, 8)).finish()
    pool = Pool(model, 2048)
    one = Driver(pool.scheduler("a", prefixes), *sequences(0))
    other = Driver(pool.scheduler("b", prefixes), *sequences(4))
    most, preempted = finish(pool, one, other)
    assert one.tokens | other.tokens == free
    assert pool.limit // 2 < most <= pool.limit
    assert preempted
    for driver in (one, other):
        driver.scheduler.close()
    assert pool.pool.total_over == pool.pool.prefix_bytes == 0


def test_a_short_prompt_does_not_wait_for_another_model_s_long_conversation(model):
    pool = Pool(model, 2048, "abc")
    long = Driver(pool.scheduler("a"), sequence(0, prompt(1700), max_tokens=50))
    long.until_generated(0)
    waiting = Driver(pool.scheduler("b"), sequence(1, prompt(1100), max_tokens=5))
    waiting.step()
    assert waiting.scheduler.waiting() == {1}
    short = Driver(pool.scheduler("c"), sequence(2, prompt(100), max_tokens=5))
    short.until_generated(2)
    assert not long.scheduler.is_empty()
    finish(pool, long, waiting, short)
    assert len(waiting.tokens[1]) == 5


def test_a_prompt_takes_the_memory_of_another_model_s_prefixes(model):
    pool = Pool(model, 2048)
    one, other = pool.scheduler("a", prefixes=True), pool.scheduler("b", prefixes=True)
    Driver(one, sequence(0, prompt(800), max_tokens=2)).finish()
    assert pool.pool.prefix_bytes > 0
    Driver(other, sequence(1, prompt(1900), max_tokens=2)).until_generated(1)
    assert pool.held <= pool.limit
    assert pool.prefix_cache.tier.nbytes(ModelIdentity("a")) == 0


def test_the_longest_sequence_is_what_the_pool_could_hold_alone_and_it_is_served(model):
    pool = Pool(model, 2048)
    scheduler = pool.scheduler("a")
    pool.publish(evicted="b")
    longest = scheduler.longest(10**6)
    assert 2048 < longest < 4096
    assert scheduler.longest(100) == 100
    driver = Driver(scheduler, sequence(0, prompt(longest - ANSWER), max_tokens=ANSWER))
    most, preempted = finish(pool, driver)
    assert len(driver.tokens[0]) == ANSWER
    assert most <= pool.limit
    assert not preempted


def test_a_prompt_that_can_not_be_held_beside_other_models_fails_once_its_own_is_unloaded(model):
    pool = Pool(model, 2048)
    driver = Driver(pool.scheduler("a"), sequence(0, prompt(3000), max_tokens=2))
    driver.step()
    pool.answer()
    pool.publish(leaving="a")
    with pytest.raises(MemoryError):
        driver.step()


def test_a_sequence_that_leaves_while_it_waits_for_memory_leaves_no_claim_behind(model):
    pool = Pool(model, 2048)
    long = Driver(pool.scheduler("a"), sequence(0, prompt(1700), max_tokens=50))
    long.until_generated(0)
    waiting = Driver(pool.scheduler("b"), sequence(1, prompt(1700), max_tokens=5))
    waiting.step()
    assert len(pool.pool.waiting) == 1
    waiting.scheduler.remove([1])
    assert not pool.pool.waiting
