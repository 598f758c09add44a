"""Prefixes of a model in a prefix cache of its own, and the answers with them."""

from dataclasses import replace

from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import Driver, sequence


def new_prefixes(max_bytes=1 << 30, policy=None, **identity):
    return PrefixCache(RamTier(policy)).open(ModelIdentity("tiny", **identity), max_bytes)


class Entries:
    """Prefixes of so many bytes."""

    total_bytes = 0

    def shrink(self, max_bytes):
        self.total_bytes = min(self.total_bytes, max_bytes)


class Asked:
    """A model that is asked with a prefix cache, each answer compared with that of a scheduler without one.

    alone: answers without one by their prompts, for several of the same model; each is computed once. options: of the
    scheduler.
    """

    def __init__(self, model, prefixes, *, alone=None, **options):
        self.model = model
        self.prefixes = prefixes
        self.driver = Driver(Scheduler(model, prefixes=prefixes, **options))
        self._alone = {} if alone is None else alone

    def ask(self, tokens, boundaries=()):
        """The answer, which is right, and how many tokens came from a cache."""
        id = len(self.driver.tokens)
        self.driver.add(replace(sequence(id, tokens), boundaries=boundaries))
        answer = self.driver.finish()[id]
        if tokens not in self._alone:
            self._alone[tokens] = Driver(Scheduler(self.model), sequence(0, tokens)).finish()[0]
        assert answer == self._alone[tokens]
        return tuple(answer), self.driver.cached[id]
