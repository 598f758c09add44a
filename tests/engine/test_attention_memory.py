"""Chunks are held to the memory of attention scores where these are in memory, and only there."""

from mlxserver.engine.mlx import mx

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.kv_cache import caches, ragged
from mlxserver.engine.platform import cpu_attention, cpu_layers, device
from mlxserver.engine.platform.attention_memory import AttentionMemory
from mlxserver.engine.platform.native.extension import native
from mlxserver.engine.platform.policy import CPU, current
from mlxserver.engine.scheduler.plain_prefill import PlainPrefill
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.sequence import Sequence
from tests.support.architectures import random_model

needs_kernels = pytest.mark.skipif(
    not (device.is_cpu() and native() and current().replace_kernels), reason="the native kernels are not in use"
)


@pytest.fixture
def replaced():
    def make(name, **fields):
        model = random_model(name, **fields)
        cpu_layers.replace_functions()
        ragged.bind()
        return model

    return make


@given(heads=st.integers(1, 128), wanted=st.integers(16, 4096), data=st.data())
def test_a_chunk_without_scores_is_as_long_as_at_the_start_of_a_prompt(heads, wanted, data):
    done, plain = data.draw(st.integers(0, 20_000)), AttentionMemory(heads, CPU)
    chunk = AttentionMemory(heads, CPU, in_blocks=True).fit(wanted, done)
    assert chunk <= plain.fit(wanted, 0)
    assert chunk == plain.fit(wanted, 0) or 3 * 4 * (chunk + 1) * (done + chunk + 1) > 128 << 20
    assert chunk >= plain.fit(wanted, done)


def test_a_chunk_without_scores_is_held_to_its_masks():
    memory = AttentionMemory(32, CPU, in_blocks=True)
    assert (memory.fit(4096, 0), memory.fit(4096, 6000), memory.fit(100, 6000)) == (362, 362, 100)
    assert memory.fit(4096, 100_000) == 111
    assert memory.fit(4096, 10_000_000) == 16


def test_what_is_counted_for_a_model_does_not_depend_on_where_its_scores_are():
    for context in (1000, 100_000):
        assert AttentionMemory(32, CPU, in_blocks=True).max_bytes(context) == AttentionMemory(32, CPU).max_bytes(
            context
        )


@needs_kernels
@pytest.mark.parametrize(
    ("name", "fields", "is_in_blocks"),
    [
        ("llama", {}, True),
        ("llama", {"num_attention_heads": 2, "head_dim": 1000}, False),
        ("gemma3_text", {}, True),  # windows, whose masks are arrays
        ("nemotron_h", {}, True),
        ("gemma2", {}, False),  # soft caps
        ("kimi_k25", {}, False),  # a latent attention, which adds scores of its own
        ("mamba", {}, False),
    ],
)
def test_models_whose_attention_has_no_scores_in_memory(replaced, name, fields, is_in_blocks):
    assert caches.attends_in_blocks(replaced(name, **fields)) == is_in_blocks


@needs_kernels
def test_a_model_in_16_bits_has_scores_in_memory(replaced):
    model = replaced("llama")
    model.set_dtype(mx.bfloat16)
    assert not caches.attends_in_blocks(model)


@needs_kernels
def test_behind_a_long_prompt_a_chunk_of_a_model_of_many_heads_is_as_long_as_at_its_start(replaced):
    prefill = PlainPrefill(replaced("llama", num_attention_heads=32, num_key_value_heads=8, head_dim=8))
    sequence = Sequence(1, (1,) * 9000, SamplingParams(temperature=0.0), 4)
    for done in (0, 8000):
        assert prefill.choose([PendingPrompt([sequence], 0.0, done=done)], 250).length == 250


@needs_kernels
def test_attention_in_blocks_takes_no_more_memory_than_its_masks():
    heads, total, chunk = 64, 4000, 256
    q, keys = mx.random.normal((1, heads, chunk, 16)), mx.random.normal((1, 8, total, 16))
    mx.eval(q, keys)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cpu_attention.attention(q, keys, keys, scale=0.25, mask=mx.ones((chunk, total), dtype=mx.bool_)))
    masks = 3 * 4 * chunk * total
    assert mx.get_peak_memory() - before <= masks + q.nbytes


@needs_kernels
def test_calls_are_recorded_within_the_context_alone():
    q, keys = mx.ones((1, 4, 80, 16)), mx.ones((1, 2, 80, 16))
    with cpu_attention.watching() as calls:
        cpu_attention.attention(q, keys, keys, scale=1.0, mask="causal")
        cpu_attention.attention(q, keys, keys, scale=1.0, mask=mx.zeros((1, 4, 80, 80)))
        cpu_attention.attention(q, keys, keys, scale=1.0, sinks=mx.zeros(4))
    cpu_attention.attention(q, keys, keys, scale=1.0)
    assert calls == [True, False, False]
