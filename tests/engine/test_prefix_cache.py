"""The prefix cache of a process: which entries are found, by which models, and how long they live."""

import random
import shutil
import threading
from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm import load

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.platform import streams
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.prefixes import new_prefixes

POISON = 301  # a token that prompt() never has
PROMPT = prompt(40, seed=5)


@pytest.fixture
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def filled(model, tokens):
    cache = caches.new_cache(model)
    model(mx.array([list(tokens)]), cache=cache)
    return cache


@pytest.mark.parametrize("number", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("position", [0, 20, 39])
def test_a_number_that_is_not_finite_anywhere_is_found_in_the_last_layer(model, number, position):
    model.model.embed_tokens.weight[POISON] = number
    assert caches.is_finite(filled(model, PROMPT)).item()
    tokens = [*PROMPT[:position], POISON, *PROMPT[position + 1 :]]
    assert not caches.is_finite(filled(model, tokens)).item()


def test_an_entry_with_nan_is_not_fetched_but_a_shorter_sound_one(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    prefixes = new_prefixes()
    prefixes.store([*PROMPT[:30], POISON], filled(model, [*PROMPT[:30], POISON]))
    prefixes.store([*PROMPT[:20], 7, 7], filled(model, [*PROMPT[:20], 7, 7]))
    assert prefixes.fetch([*PROMPT[:30], POISON, 5])[1] == 20
    assert prefixes.fetch(PROMPT)[1] == 20


def test_ranks_that_share_a_model_do_not_look_for_nan(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    prefixes = new_prefixes(bytes_per_token=8)
    prefixes.store([*PROMPT, POISON], filled(model, [*PROMPT, POISON]))
    assert prefixes.fetch([*PROMPT, POISON, 5])[1] == 41


def test_a_sequence_that_overflowed_changes_no_answer_after_it(model):
    model.model.embed_tokens.weight[POISON] = mx.nan
    answer = Driver(Scheduler(model), sequence(1, PROMPT)).finish()[1]
    driver = Driver(Scheduler(model, prefixes=new_prefixes()), sequence(1, [*PROMPT[:30], POISON]))
    driver.finish()
    driver.add(sequence(2, PROMPT))
    assert driver.finish()[2] == answer
    assert driver.cached[2] == 0
    driver.add(sequence(3, PROMPT))
    assert driver.finish()[3] == answer
    assert driver.cached[3] == 39


LONG = tuple(range(40))


@pytest.fixture
def cache():
    return PrefixCache(RamTier())


def fetched(prefixes, tokens=(*LONG, 99)):
    return prefixes.fetch(tokens)[1]


def test_loaded_models_of_one_identity_share_entries_and_no_others_do(model, cache):
    identity = ModelIdentity("files", weights="float32")
    first, second = cache.open(identity, 1 << 30), cache.open(replace(identity), 1 << 30)
    others = [
        cache.open(replace(identity, **{field: "another"}), 1 << 30)
        for field in ("files", "adapter", "weights", "kv_format", "share")
    ]
    first.store(LONG, filled(model, LONG))
    assert (fetched(first), fetched(second)) == (40, 40)
    assert [fetched(other) for other in others] == [0] * 5


def test_entries_are_dropped_with_the_last_loaded_model_of_their_identity(model, cache):
    first, second = (cache.open(ModelIdentity("files"), 1 << 30) for _ in range(2))
    first.store(LONG, filled(model, LONG))
    first.close()
    first.close()
    assert fetched(second) == 40
    second.close()
    assert (second.nbytes, fetched(second)) == (0, 0)
    assert fetched(cache.open(ModelIdentity("files"), 1 << 30)) == 0


def test_entries_keep_to_the_smallest_limit_of_their_models(model, cache):
    large, small = (cache.open(ModelIdentity("files"), limit) for limit in (1 << 30, 1))
    large.store(LONG, filled(model, LONG))
    assert large.nbytes == 0
    small.close()
    large.store(LONG, filled(model, LONG))
    assert large.nbytes > 0
    cache.open(ModelIdentity("files"), 1).close()
    assert large.nbytes > 0


def test_the_least_recently_used_entry_of_any_model_goes_first(model, cache):
    models = [cache.open(ModelIdentity(name), 1 << 30) for name in "abc"]
    for prefixes in models:
        prefixes.store(LONG, filled(model, LONG))
    one = models[0].nbytes
    assert fetched(models[0]) == 40
    cache.tier.shrink(2 * one)
    assert [prefixes.nbytes for prefixes in models] == [one, 0, one]
    cache.tier.shrink(0)
    assert [prefixes.nbytes for prefixes in models] == [0, 0, 0]


def test_ranks_count_entries_by_tokens(model):
    prefixes = new_prefixes(bytes_per_token=8)
    prefixes.store(LONG, filled(model, LONG))
    assert prefixes.nbytes == 40 * 8


def test_threads_of_several_models_use_the_cache_at_once(model, cache):
    """Two threads share an identity, a third one has its own; all of them find what they stored, or nothing."""
    lengths, failures = set(), []

    def work(name, seed):
        prefixes, chance = cache.open(ModelIdentity(name), 60 * 40_000), random.Random(seed)
        try:
            with streams.thread_stream():
                for _ in range(150):
                    start = chance.randrange(6) * 50
                    tokens = list(range(start, start + 16 + chance.randrange(30)))
                    prefixes.store(tokens, filled(model, tokens))
                    found, length = prefixes.fetch([*tokens, 7])
                    lengths.add(length >= 16 or length == 0)
                    lengths.add(found is None or found[0].offset == length)
                    prefixes.shrink(chance.randrange(10) * 40_000)
        except BaseException as error:
            failures.append(error)
        finally:
            prefixes.close()

    threads = [threading.Thread(target=work, args=task) for task in (("a", 1), ("a", 2), ("b", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, lengths) == ([], {True})
    assert [cache.tier.nbytes(ModelIdentity(name)) for name in "ab"] == [0, 0]


def test_a_model_s_prefixes_are_dropped_when_it_is_unloaded(tiny_llama_path):
    builder = Builder(0.25)
    spec = ModelSpec("tiny", str(tiny_llama_path), context_length=2048)
    batch = builder.build(spec).batch
    Driver(batch, sequence(1, PROMPT)).finish()
    identity = model_identity(spec, loader.load(spec))
    assert builder.prefix_cache.tier.nbytes(identity) > 0
    batch.close()
    assert builder.prefix_cache.tier.nbytes(identity) == 0


def test_a_model_that_can_not_be_warmed_up_leaves_no_prefixes(tiny_llama_path):
    builder = Builder(0.25)
    spec = ModelSpec("tiny", str(tiny_llama_path), context_length=2048)
    with pytest.raises(ZeroDivisionError):
        builder.build(spec, progress=lambda stage, *_: 1 / (stage != "warming up"))
    identity = model_identity(spec, loader.load(spec))
    assert builder.prefix_cache.limit(identity) == 0


def test_an_identity_changes_with_the_files_and_the_adapter(tiny_llama_path, tmp_path):
    copied = shutil.copytree(tiny_llama_path, tmp_path / "model")
    spec = ModelSpec("m", str(copied))
    loaded = loader.load(spec)
    identity = model_identity(spec, loaded)
    assert model_identity(replace(spec, key="other", max_running=3), loader.load(spec)) == identity
    (adapter := tmp_path / "adapter").mkdir()
    assert model_identity(replace(spec, adapter=str(adapter)), loaded) != identity
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert model_identity(spec, loaded) != identity
