"""Families of embedding models and rerankers, each beside mlx-vlm's own loader and classes in this process."""

import json
from dataclasses import replace

from mlxserver.engine.mlx import mx, nn

import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import embedding_model, reranker_model, sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.kinds import find_kind
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU, WeightPolicy
from mlxserver.engine.prompt.pairs import INSTRUCTION, Cut, EncoderPairs, JudgePairs
from tools.harness.encoder_models import (
    CROSS_ENCODERS,
    FAMILIES,
    POSITIONS,
    tiny_cross_encoder,
    tiny_embedder,
    tiny_judge,
)

TEXTS = ("the cat sat on a mat", "dog", "one two three " * 20, "a dog ran far away from the cat", "no")
QUERY = "whether the cat sat"
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def exact(model):
    """The model with GELU as transformers has it: mlx-vlm approximates it in ModernBERT, by 4e-4 in these scores."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.GELU)]
    model.update_modules(tree_unflatten([(name, nn.GELU()) for name in layers]))
    return model


def reference_vectors(path):
    from mlx_vlm.embedding_loader import load_embedding_model
    from mlx_vlm.models.pooling import read_pooling_config
    from transformers import AutoTokenizer

    model, tokenizer = exact(load_embedding_model(path)), AutoTokenizer.from_pretrained(path)
    model.pooling_config = read_pooling_config(path)
    return [np.array(model(mx.array([tokenizer.encode(text)])).text_embeds[0]) for text in TEXTS]


def cross_encoder_scores(path):
    from mlx_vlm.reranker_loader import load_sequence_classification_model
    from transformers import AutoTokenizer

    model, tokenizer = exact(load_sequence_classification_model(path)), AutoTokenizer.from_pretrained(path)
    scores = []
    for text in TEXTS:
        encoded = tokenizer(QUERY, text, return_tensors="np")
        inputs = {name: mx.array(encoded[name]) for name in tokenizer.model_input_names}
        scores.append(mx.sigmoid(model(**inputs).logits)[0, 0].item())
    return scores


def judge_scores(path, instruction=INSTRUCTION):
    """As mlx-vlm computes them, for one document at a time."""
    from mlx_vlm.utils import load_model
    from transformers import AutoTokenizer

    model, tokenizer = load_model(path), AutoTokenizer.from_pretrained(path)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    scores = []
    for text in TEXTS:
        content = f"<Instruct>: {instruction}\n\n<Query>: {QUERY}\n\n<Document>: {text}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt += "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        logits = model.language_model(mx.array([tokens])).logits[0, -1]
        scores.append(mx.sigmoid(logits[yes] - logits[no]).item())
    return scores


def scores_of(model, pairs, rows, count, length):
    """Scores of some of the pairs in one batch."""
    chosen = [pairs[row] for row in rows]
    found = model.encode([each.tokens for each in chosen], count, length, False, [each.second for each in chosen])
    return [float(each[0]) for each in found]


def check_every_mix(model, pairs, wanted):
    longest = max(len(pair.tokens) for pair in pairs)
    for rows, count, length in (
        *(([row], 1, len(pair.tokens)) for row, pair in enumerate(pairs)),
        (range(len(pairs)), len(pairs), longest),
        ((4, 1, 0), 4, longest + 3),
        ((1, 1, 4), 8, longest),
    ):
        np.testing.assert_allclose(
            scores_of(model, pairs, rows, count, length), [wanted[row] for row in rows], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_mlx_vlm_alone_and_in_any_mix(tmp_path, family):
    path = tiny_embedder(tmp_path / "m", family)
    assert sources.known_kind(str(path)) == "embedding"
    model, wanted = embedding_model.load(ModelSpec("m", str(path))), reference_vectors(path)
    texts = [tuple(model.tokenizer.encode(text)) for text in TEXTS]
    longest = max(map(len, texts))
    for rows, count, length in (
        *(([row], 1, len(text)) for row, text in enumerate(texts)),
        (range(len(texts)), len(texts), longest),
        ((2, 4, 0), 4, longest + 3),
        ((1, 3), 8, 16),
    ):
        vectors = model.encode([texts[row] for row in rows], count, length)
        for row, vector in zip(rows, vectors, strict=True):
            assert vector @ wanted[row] > 0.9999
            np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen3", {"rope_theta": 500.0}, {"rope_theta": 500.0}),
        (
            "modernbert",
            {"global_rope_theta": 500.0, "local_rope_theta": 50.0},
            {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 50.0}},
        ),
        (
            "gemma3_text",
            {"rope_global_base_freq": 500.0, "rope_local_base_freq": 50.0},
            {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 50.0}},
        ),
    ],
)
def test_rotary_embeddings_are_as_transformers_5_states_them(tmp_path, family, old, new):
    path = tiny_embedder(tmp_path / "m", family, **old)
    spec, text = ModelSpec("m", str(path)), tuple(range(6, 20))
    (wanted,) = embedding_model.load(spec).encode([text], 1, len(text))
    config = json.loads((path / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in old} | {"rope_parameters": new}
    (path / "config.json").write_text(json.dumps(config))
    assert estimate(spec).weights > 0
    np.testing.assert_allclose(embedding_model.load(spec).encode([text], 1, len(text))[0], wanted, atol=1e-6)


@pytest.mark.parametrize("family", CROSS_ENCODERS)
def test_scores_of_a_cross_encoder_are_those_of_mlx_vlm_alone_and_in_any_mix(tmp_path, family):
    path = tiny_cross_encoder(tmp_path / "m", family)
    assert sources.known_kind(str(path)) == "rerank"
    model, wanted = reranker_model.load(ModelSpec("m", str(path))), cross_encoder_scores(path)
    assert len({round(score, 3) for score in wanted}) == len(TEXTS)
    pairs = EncoderPairs(model.tokenizer, has_types=model.facts.has_types).tokenize(QUERY, TEXTS, None, Cut())
    assert any(pair.second for pair in pairs) == (family == "bert")
    check_every_mix(model, pairs, wanted)


@pytest.mark.parametrize("is_tied", [True, False])
def test_scores_of_a_judge_are_those_of_mlx_vlm_alone_and_in_any_mix(tmp_path, is_tied):
    path = tiny_judge(tmp_path / "m", tie_word_embeddings=is_tied)
    assert sources.known_kind(str(path)) == "rerank"
    model = reranker_model.load(ModelSpec("m", str(path)))
    for instruction in (None, "judge the dog"):
        wanted = judge_scores(path, instruction or INSTRUCTION)
        assert len({round(score, 3) for score in wanted}) == len(TEXTS)
        pairs = JudgePairs(model.tokenizer).tokenize(QUERY, TEXTS, instruction, Cut())
        check_every_mix(model, pairs, wanted)


def test_a_judge_that_stays_quantized_scores_as_a_dequantized_one(tmp_path):
    spec = ModelSpec("m", str(tiny_judge(tmp_path / "m", quantization={"group_size": 32, "bits": 8})))
    scores = []
    for weights in (WeightPolicy.STORED, WeightPolicy.FLOAT32):
        model = reranker_model.load(spec, policy=replace(CPU, weights=weights, replace_kernels=False))
        pairs = JudgePairs(model.tokenizer).tokenize(QUERY, TEXTS, None, Cut())
        scores.append(scores_of(model, pairs, range(5), 5, max(len(pair.tokens) for pair in pairs)))
    np.testing.assert_allclose(*scores, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "judge"])
def test_documents_are_cut_and_the_query_is_not(tmp_path, family):
    if family == "judge":
        path = tiny_judge(tmp_path / "m")
        pairs = JudgePairs(reranker_model.load(ModelSpec("m", str(path))).tokenizer)
    else:
        path = tiny_cross_encoder(tmp_path / "m", family)
        pairs = EncoderPairs(reranker_model.load(ModelSpec("m", str(path))).tokenizer, has_types=True)
    whole, empty = pairs.tokenize(QUERY, ["dog " * 50, ""], None, Cut())
    others = len(empty.tokens)
    assert len(whole.tokens) == others + 50
    for cut, length in (
        (Cut(document=3), others + 3),
        (Cut(pair=others + 7), others + 7),
        (Cut(document=3, pair=others + 7), others + 3),
        (Cut(document=60), others + 50),
        (Cut(pair=others - 5), others),
    ):
        (found,) = pairs.tokenize(QUERY, ["dog " * 50], None, cut)
        assert len(found.tokens) == length
        assert found.second == whole.second
        assert (found.tokens[0], found.tokens[-1]) == (whole.tokens[0], whole.tokens[-1])


@pytest.mark.parametrize(
    ("config", "ranks", "kind"),
    [
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 1}, False, "rerank"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"]}, False, "rerank"),
        (
            {
                "model_type": "bert",
                "architectures": ["BertForSequenceClassification"],
                "id2label": {"0": "a", "1": "b"},
            },
            False,
            "embedding",
        ),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, True, "rerank"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, True, "text"),
    ],
)
def test_a_reranker_is_known_by_its_files(config, ranks, kind):
    assert find_kind(config, pools=False, ranks=ranks) == kind


def test_a_judge_without_a_part_for_it_is_known_by_its_name(tmp_path):
    for name, kind in (("Qwen3-Reranker-0.6B", "rerank"), ("Qwen3-0.6B", "text")):
        path = tiny_judge(tmp_path / name)
        (path / "modules.json").unlink()
        assert sources.known_kind(str(path)) == kind


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of float32")
@pytest.mark.parametrize("family", [*CROSS_ENCODERS, "judge"])
def test_the_weights_of_a_reranker_are_estimated_before_they_are_read(tmp_path, family):
    path = tiny_judge(tmp_path / "m") if family == "judge" else tiny_cross_encoder(tmp_path / "m", family)
    spec = ModelSpec("m", str(path))
    before, model = estimate(spec), reranker_model.load(spec)
    assert (before.weights, before.cache) == (model.facts.weight_bytes, 0)
    assert model.context_length == (512 if family == "judge" else POSITIONS)


@pytest.mark.skipif(not device.is_cpu(), reason="the figures are those of a CPU")
@pytest.mark.parametrize("family", CROSS_ENCODERS)
def test_a_long_text_takes_what_was_counted_and_not_its_scores(tmp_path, family):
    sizes = {"hidden_size": 192, "num_attention_heads": 8, "intermediate_size": 768, "max_position_embeddings": 1026}
    spec = ModelSpec("m", str(tiny_cross_encoder(tmp_path / "m", family, **sizes)))
    counted, model = estimate(spec).activations, reranker_model.load(spec)
    length = model.context_length
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.encode([(7,) * length], 1, length)
    taken = mx.get_peak_memory() - before
    runtime, scores = 32 << 20, 8 * 4 * 8 * length**2  # bytes
    assert 0.4 * (counted - runtime) < taken < 1.15 * (counted - runtime) < scores / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertModel"]}, "'bert' is no reranker"),
        ({"hidden_size": 48}, "can't be"),
        ({"model_file": "code.py"}, "names code in the checkpoint"),
    ],
)
def test_what_is_no_reranker_fails_in_one_line(tmp_path, change, words):
    path = tiny_cross_encoder(tmp_path / "m", "bert")
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | change))
    with pytest.raises(LoadFailed, match=words) as caught:
        reranker_model.load(ModelSpec("m", str(path), kind="rerank"))
    assert "\n" not in str(caught.value)
