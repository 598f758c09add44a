"""Prefixes of a model in a prefix cache of its own."""

from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier


def new_prefixes(max_bytes=1 << 30, policy=None, **identity):
    return PrefixCache(RamTier(policy)).open(ModelIdentity("tiny", **identity), max_bytes)
