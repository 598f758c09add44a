"""Embedding models: their kind, their vectors beside plain numpy, their memory, and their batches."""

import json

from mlxserver.engine.mlx import mx

import numpy as np
import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import embedding_model, sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.kinds import find_kind
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU, CUDA
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.scheduler.encoder_batch import EncoderBatch, length_classes
from mlxserver.engine.scheduler.peers import FixedPeers
from mlxserver.engine.scheduler.prefill import ChunkTimes
from mlxserver.engine.sequence import Sequence
from tools.harness.embedding_models import HIDDEN, hidden_states, tiny_bert, token_ids

TEXTS = ("the cat sat on a mat", "dog", "one two three " * 12, "a dog ran far away from the cat")
POOLED = {
    "mean_tokens": lambda h: h.mean(0),
    "cls_token": lambda h: h[0],
    "lasttoken": lambda h: h[-1],
    "max_tokens": lambda h: h.max(0),
}


def expected(text, pooling="mean_tokens", is_normalized=True):
    vector = POOLED[pooling](hidden_states(token_ids(text)))
    return vector / np.linalg.norm(vector) if is_normalized else vector


@pytest.mark.parametrize(
    ("config", "pools", "kind"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, False, "embedding"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, True, "embedding"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, False, "text"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"]}, False, "embedding"),
        ({"model_type": "llama"}, False, "text"),
        ({"architectures": "damaged"}, False, "text"),
    ],
)
def test_the_kind_is_found_from_the_files(config, pools, kind):
    assert find_kind(config, pools=pools) == kind


def test_a_pooling_part_tells_the_kind_of_a_directory(tmp_path, tiny_llama_path):
    assert sources.known_kind(str(tiny_bert(tmp_path / "bert"))) == "embedding"
    assert sources.known_kind(str(tiny_llama_path)) == "text"
    assert sources.known_kind("org/name-that-is-not-here") is None


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("pooling", POOLED)
def test_vectors_are_those_of_plain_numpy_alone_and_in_any_batch(tmp_path, pooling, is_normalized):
    path = tiny_bert(tmp_path / "bert", pooling=pooling, is_normalized=is_normalized)
    model = embedding_model.load(ModelSpec("m", str(path)))
    texts = [token_ids(text) for text in TEXTS]
    alone = [model.encode([text], 1, len(text))[0] for text in texts]
    batched = model.encode(texts, 8, 48)
    for text, *vectors in zip(TEXTS, alone, batched, strict=True):
        for vector in vectors:
            np.testing.assert_allclose(vector, expected(text, pooling, is_normalized), rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
def test_the_weights_are_estimated_before_they_are_read(tmp_path):
    spec = ModelSpec("m", str(tiny_bert(tmp_path / "bert")))
    before = estimate(spec)
    assert (before.weights, before.cache) == (embedding_model.load(spec).weight_bytes, 0)
    assert before.activations > 0


@pytest.mark.parametrize("weights", ["stored", "bfloat16"])
def test_the_weights_are_held_as_the_settings_say_and_counted_so(tmp_path, weights):
    path = tiny_bert(tmp_path / "bert")
    for file in path.rglob("model*.safetensors"):
        mx.save_safetensors(str(file), {name: array.astype(mx.bfloat16) for name, array in mx.load(str(file)).items()})
    spec = ModelSpec("m", str(path), weights=weights)
    stored, in_float32 = estimate(spec).weights, estimate(ModelSpec("m", str(path)), CPU).weights
    assert embedding_model.load(spec).weight_bytes == in_float32 // 2
    assert stored == pytest.approx(in_float32 // 2, rel=0.1)


def test_a_longer_context_than_its_positions_is_not_served(tmp_path):
    path = str(tiny_bert(tmp_path / "bert"))
    lengths = [embedding_model.load(ModelSpec("m", path, context_length=n)).context_length for n in (10, 100, None)]
    assert lengths == [10, 64, 64]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "no-such"}, "no-such"),
        ({"hidden_size": 48}, "can't be"),
        ({"model_file": "code.py"}, "names code in the checkpoint"),
    ],
)
def test_a_broken_checkpoint_fails_in_one_line(tmp_path, change, words):
    path = tiny_bert(tmp_path / "bert", **change)
    with pytest.raises(LoadFailed, match=words) as caught:
        Builder(0.25).build(ModelSpec("m", str(path), kind="embedding"))
    assert "\n" not in str(caught.value)


def test_an_adapter_is_refused(tmp_path):
    path = str(tiny_bert(tmp_path / "bert"))
    with pytest.raises(LoadFailed, match="'adapter'"):
        Builder(0.25).build(ModelSpec("m", path, adapter=str(tmp_path)))


class Lengths:
    """A model whose vectors are [tokens of the text]; it notes its batches, and raises the next of `faults`."""

    context_length = 512
    heads = 4

    def __init__(self):
        self.shapes = []
        self.faults = []

    def encode(self, texts, count, length, beside_peers=False, second_texts=()):
        if self.faults:
            raise self.faults.pop(0)
        assert all(len(text) <= length for text in texts)
        self.shapes.append((count, length))
        return [np.array([len(text)], dtype=np.float32) for text in texts]


def batch_of(policy=CPU, peers=0.0, times=None):
    model = Lengths()
    return model, EncoderBatch(model, stall_target=0.25, peers=FixedPeers(peers), policy=policy, times=times)


def times_of(base, each):
    """Times of batches of `base` seconds and `each` seconds per token, as measured."""
    times = ChunkTimes()
    for tokens in (1000, 2000):
        times.note(tokens, base + each * tokens)
    return times


def sequences(*lengths, first=0):
    return [Sequence(first + n, (1,) * length, SamplingParams(), 1) for n, length in enumerate(lengths)]


def drained(batch):
    steps = []
    while not batch.is_empty():
        vectors = batch.decode()
        batch.remove([done.sequence_id for done in vectors])  # as the engine does
        steps.append([(done.sequence_id, int(np.frombuffer(done.vector, "<f4")[0])) for done in vectors])
    return steps


def test_every_text_has_its_own_vector_and_a_batch_has_texts_of_about_one_length():
    model, batch = batch_of()
    lengths = [5, 500, 6, 300, 7, 480, 16, 1, 310]
    batch.insert(sequences(*lengths))
    steps = drained(batch)
    assert sorted(done for step in steps for done in step) == list(enumerate(lengths))
    for step in steps:
        longest = max(length for _, length in step)
        assert all(length >= 0.75 * longest or longest <= 16 for _, length in step)
    assert (batch.load.is_busy, batch.load.num_running) == (False, 0)


@pytest.mark.parametrize("policy", [CPU, CUDA])
@pytest.mark.parametrize(
    ("base", "each", "together"), [(0.0, 1e-5, {16}), (2e-4, 2e-6, {16, 60}), (0.005, 1e-6, {16, 60, 128, 200})]
)
def test_texts_of_unlike_lengths_share_a_batch_where_padding_takes_less_time_than_another(policy, base, each, together):
    _, batch = batch_of(policy, times=times_of(base, each))
    batch.insert(sequences(16, 60, 128, 200))
    assert {length for _, length in drained(batch)[0]} == together


def test_one_query_does_not_wait_for_a_thousand_documents():
    _, batch = batch_of()
    batch.insert(sequences(*[200] * 1000))
    batch.decode()
    batch.insert(sequences(20, first=5000))
    steps = [[done.sequence_id for done in batch.decode()] for _ in range(2)]
    assert [5000] in steps


def test_shapes_recur_where_they_have_to():
    model, batch = batch_of(CUDA)
    batch.insert(sequences(*range(1, 200)))
    drained(batch)
    assert all(count & (count - 1) == 0 and length in length_classes(512) for count, length in model.shapes)


def test_a_batch_beside_streams_is_smaller_where_their_steps_wait_for_it():
    sizes = {}
    for peers in (0.0, 0.02):
        model, batch = batch_of(CUDA, peers)
        batch.insert(sequences(*[16] * 200))
        batch.decode()
        sizes[peers] = model.shapes[0][0]
    assert sizes[0.02] < sizes[0.0]


def test_removed_texts_are_not_processed():
    _, batch = batch_of()
    batch.insert(sequences(10, 10, 10))
    batch.remove([0, 2, 99])
    assert drained(batch) == [[(1, 10)]]


def test_after_a_fault_only_the_texts_at_work_are_not_waiting_and_those_that_stay_are_processed():
    model, batch = batch_of()
    batch.insert(sequences(10, 400))
    model.faults.append(MemoryError())
    with pytest.raises(MemoryError):
        batch.decode()
    assert len(batch.waiting()) == 1
    assert batch.restart({0, 1}) == []
    assert sorted(done for step in drained(batch) for done in step) == [(0, 10), (1, 400)]


def test_length_classes_end_with_the_longest_text():
    classes = length_classes(500)
    assert (classes[0], classes[-1]) == (16, 500)
    assert list(classes) == sorted({*classes})
    assert length_classes(8) == (8,)


def test_damaged_settings_of_vectors_count_as_none(tmp_path):
    path = tiny_bert(tmp_path / "bert", matryoshka_dimensions="all")
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": [1], "default_prompt_name": 3}))
    facts = embedding_model.load(ModelSpec("m", str(path))).facts
    assert (facts.dimensions, facts.nested, facts.prompts, facts.default_prompt) == (HIDDEN, (), {}, None)
