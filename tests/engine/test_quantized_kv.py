"""Quantised keys and values: as mlx-lm's own alone, the same text in company, from memory and from disk."""

from dataclasses import replace
from functools import cache

from mlxserver.engine.mlx import mx

import pytest
from mlx_lm.models import base, llama
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.kv_cache import cache_files, caches
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.quantized import KVFormat
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.loading.kv_format import quantize_kv
from mlxserver.engine.loading.unsupported import Unsupported
from mlxserver.engine.platform.policy import CPU
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import CONFIGS, MORE_CONFIGS, random_model, write_random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.prefixes import new_prefixes

DIMS = {"head_dim": 64, "hidden_size": 256, "hidden_dim": 256, "n_embd": 256}
FORMATS = [KVFormat(8, 64), KVFormat(4, 32)]
PATHS = {  # of all devices; what is compiled on a GPU is what is computed in padded slots
    "slots": CPU,
    "padded": replace(CPU, pad_slots=True, bucket_prefill=True),
    "merged": replace(CPU, batch_cache="merged"),
}


@cache
def model(name="llama", kv=None):
    own = random_model(name, **DIMS)
    quantize_kv(own, kv)
    return own


def asked():
    return [sequence(n, prompt(length, n), max_tokens=8) for n, length in enumerate((40, 7, 300, 40, 1030))]


def run(own, *sequences, policy=CPU, **options):
    return Driver(Scheduler(own, max_running=8, policy=policy, **options), *sequences).finish()


@cache
def alone(tokens, max_tokens, kv, name="llama", *, has_mlx_lm_s=False):
    """Greedy tokens of mlx-lm's model, with our cache or with mlx-lm's."""
    own = model(name, None if has_mlx_lm_s else kv)
    layers = [QuantizedKVCache(kv.group_size, kv.bits) for _ in own.layers]
    cache = layers if has_mlx_lm_s else caches.new_cache(own)
    logits = own(mx.array([tokens]), cache=cache)
    chosen = []
    while len(chosen) < max_tokens:
        chosen.append(mx.argmax(logits[0, -1]).item())
        logits = own(mx.array([chosen[-1:]]), cache=cache)
    return chosen


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_a_sequence_is_that_of_mlx_lm_s_own_quantised_cache(kv, monkeypatch):
    given = run(model(kv=kv), *asked()[:3])
    monkeypatch.setattr(llama, "scaled_dot_product_attention", base.scaled_dot_product_attention)
    assert given == {own.id: alone(own.tokens, 8, kv, has_mlx_lm_s=True) for own in asked()[:3]}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_tokens_are_the_same_alone_and_together(kv, path):
    expected = {own.id: alone(own.tokens, 8, kv) for own in asked()}
    assert run(model(kv=kv), *asked(), policy=PATHS[path]) == expected


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_a_model_with_states_beside_its_keys_and_values_is_the_same_alone_and_together(kv):
    own = model("nemotron_h", kv)
    expected = {each.id: alone(each.tokens, 8, kv, "nemotron_h") for each in asked()[:4]}
    assert run(own, *asked()[:4]) == expected


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_a_prefix_is_gone_on_from_with_the_same_tokens(name):
    kv, own = FORMATS[0], model(name, FORMATS[0])
    first = prompt(300, 1)
    answer = alone(first, 6, kv, name)
    longer = (*first, *answer, *prompt(20, 2))
    driver = Driver(Scheduler(own, max_running=2, prefixes=new_prefixes()), sequence(1, first, max_tokens=6))
    driver.finish()
    driver.add(sequence(2, longer, max_tokens=8))
    assert driver.finish()[2] == alone(longer, 8, kv, name)
    assert driver.cached[2] >= 300


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_a_prefix_is_restored_from_disk(tmp_path, kv, name):
    own, first = model(name, kv), prompt(300, 1)
    longer = (*first, *prompt(20, 2))

    def ask(tokens, id):
        disk = DiskTier(tmp_path, 1 << 30)
        prefixes = PrefixCache(RamTier(), disk).open(ModelIdentity("m", kv_format=str(kv)), 1 << 30)
        prefixes.is_warm = True
        driver = Driver(Scheduler(own, max_running=2, prefixes=prefixes), sequence(id, tokens, max_tokens=8))
        driver.finish()
        disk.close()
        return driver.tokens[id], driver.cached[id]

    ask(first, 1)
    tokens, cached = ask(longer, 2)
    assert tokens == alone(longer, 8, kv, name)
    assert cached >= 256


def test_a_file_gives_a_cache_back_that_can_join_a_batch(tmp_path):
    own = model(kv=FORMATS[0])
    cache = caches.new_cache(own)
    own(mx.array([prompt(20)]), cache=cache)
    path = tmp_path / "part.safetensors"
    cache_files.write(path, cache)
    restored = cache_files.restored(cache_files.read(path))
    logits = [own(mx.array([[5]]), cache=[layer.merge([layer]) for layer in each]) for each in (cache, restored)]
    assert mx.array_equal(*logits)


@pytest.mark.parametrize(("kv", "share"), [(FORMATS[0], 9 / 32), (FORMATS[1], 6 / 32)], ids=str)
def test_a_token_has_a_share_of_the_bytes(kv, share):
    """Of float32; a scale and a bias of a group have 32 bits each, too."""
    quantized, plain = (caches.bytes_per_token(model(kv=format)) for format in (kv, None))
    assert quantized == share * plain


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "config", [{"model_type": "llama"} | DIMS, {"model_type": "nemotron_h"} | CONFIGS["nemotron_h"] | DIMS]
)
def test_the_estimate_is_what_the_cache_takes(tmp_path, config, bits):
    source = str(write_random_model(tmp_path / "m", config))
    spec = ModelSpec("m", source, kv_bits=bits, kv_group_size=32)
    loaded = loader.load(spec)
    sizes = caches.cache_sizes(loaded.model)
    assert estimate(spec).cache == sizes.total(loaded.limits.reserved, loaded.limits.sequences)
    assert estimate(spec).cache < estimate(replace(spec, kv_bits=None)).cache
    identities = {model_identity(each, loader.load(each)) for each in (spec, replace(spec, kv_bits=None))}
    assert len(identities) == 2


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_the_self_check_keeps_all_paths(kv):
    assert fitting_policy(model(kv=kv), CPU, "m") == CPU


MLA = {"kimi_k25": {"text_config": CONFIGS["kimi_k25"]["text_config"] | {"kv_lora_rank": 64, "qk_rope_head_dim": 64}}}
REFUSED = {
    "mamba": "keeps states, and no keys and values",
    "rwkv7": "keeps states, and no keys and values",
    "gemma3_text": r"do not keep all tokens \(RotatingKVCache\), and can't be quantised",
    "baichuan_m1": r"do not keep all tokens \(RotatingKVCache\)",
    "llama4": r"do not keep all tokens \(ChunkedKVCache\)",
    "kimi_k25": "attention can't read quantised keys and values",
    "afm7": "attention can't read quantised keys and values",
    "gemma2": "attention can't read quantised keys and values",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_a_model_whose_cache_can_t_be_quantised_is_refused(name, reason):
    with pytest.raises(Unsupported, match=f"kv_bits is 8, but .*{reason}.*; leave kv_bits out"):
        quantize_kv(random_model(name, **DIMS | MLA.get(name, {})), KVFormat(8, 64))


def test_a_group_that_does_not_divide_a_vector_is_refused_before_and_during_the_load(tmp_path):
    spec = ModelSpec("m", str(write_random_model(tmp_path / "m", {"model_type": "llama", "head_dim": 32})), kv_bits=8)
    for step in (estimate, loader.load):
        with pytest.raises(LoadFailed, match="kv_group_size is 64, but .* have 32 dimensions; expected 32"):
            step(spec)


@pytest.mark.parametrize("name", sorted({*CONFIGS, *MORE_CONFIGS} - {*REFUSED, "bitnet"}))
def test_eight_bits_change_little_in_every_model_that_can_have_them(name):
    own = random_model(name, **DIMS)
    plain = own(mx.array([prompt(40)]), cache=make_prompt_cache(own))
    quantize_kv(own, FORMATS[0])
    cache = caches.new_cache(own)
    own(mx.array([prompt(40)[:-1]]), cache=cache)
    step = own(mx.array([prompt(40)[-1:]]), cache=cache)
    assert mx.abs(step[0, -1] - plain[0, -1]).max() < 0.1 * plain[0, -1].std() + 0.05
