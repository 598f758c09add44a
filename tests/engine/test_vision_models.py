"""Vision models: greedy answers equal to mlx-vlm's own, in any company, and what stays of an image that was seen."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

from mlxserver.engine.mlx import mx

import numpy as np
import pytest
from PIL import Image

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message, Text
from mlxserver.engine.errors import LoadFailed, PromptRejected
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.vision_architecture import build_model, inspect_vision_architecture
from mlxserver.engine.loading.vision_model import image_token, keep_last_state, load_processor, load_tower
from mlxserver.engine.platform import device
from mlxserver.engine.platform.environment import LARGEST_KEPT
from mlxserver.engine.platform.policy import CPU, CUDA, METAL
from mlxserver.engine.prompt.images import ImageProcessor
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.worker.faults import GuardedImages
from tests.support.batch_driver import Driver
from tests.support.hub import serving_hub
from tests.support.vision_models import Reference, answers, attached, question
from tools.harness.vision_models import FAMILIES, picture, tiny_vision

pytestmark = [
    pytest.mark.skipif(not device.is_cpu(), reason="a CPU computes float32, which can be compared"),
    pytest.mark.filterwarnings("ignore:Image.Image.getdata:DeprecationWarning"),  # mlx-vlm's kimi_vl calls it
]

RED, BLUE = picture(1), picture(2, 32, 64)
QUESTIONS = (
    question("Hello, how are you?"),
    question("What is the capital of France?", RED),
    question("One two three four five", RED, BLUE),
    question("The quick brown fox", BLUE),
)


def built(path, **fields):
    return Builder(0.25).build(ModelSpec("m", str(path), **fields))


LIKE_OTHERS = ("idefics3", "qwen2_vl", "qwen3_vl_moe", "qwen3_5_moe")


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in LIKE_OTHERS])
def family(request, tmp_path_factory):
    path = tiny_vision(tmp_path_factory.mktemp("vision") / request.param, request.param)
    reference = Reference(path)
    return SimpleNamespace(
        path=path, runner=built(path), answer=reference.answer, expected=[reference.answer(each) for each in QUESTIONS]
    )


def test_answers_are_mlx_vlms_alone_and_in_a_batch_of_eight(family):
    assert family.runner.facts.kind == "vision"
    assert {"vision", "chat"} <= family.runner.facts.capabilities
    expected = [tokens for tokens, _ in family.expected]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)  # a model that is blind would not be found out
    runner = built(family.path, prefix_cache_bytes=0)
    assert [answers(runner, [each])[0][0] for each in QUESTIONS] == expected
    assert answers(runner, QUESTIONS * 2)[0] == expected * 2


@pytest.mark.parametrize("name", LIKE_OTHERS)
def test_types_that_are_like_others_answer_as_mlx_vlm_does(tmp_path, name):
    path = tiny_vision(tmp_path / "m", name)
    reference, runner = Reference(path), built(path)
    assert runner.facts.kind == "vision"
    assert answers(runner, QUESTIONS[:3])[0] == [reference.answer(each)[0] for each in QUESTIONS[:3]]


def test_an_image_that_was_seen_is_cached_with_its_prompt(family):
    for each, (tokens, length) in zip(QUESTIONS, family.expected, strict=True):
        first, _ = answers(family.runner, [each])
        again, (cached,) = answers(family.runner, [each])
        assert first == again == [tokens]
        assert cached == length - 1


def test_another_image_does_not_share_a_prefix_behind_the_text_before_it(family):
    answers(family.runner, [question("Look", RED)])
    other = question("Look", picture(9))
    tokens, (cached,) = answers(family.runner, [other])
    assert tokens == [family.answer(other)[0]]
    before_the_image = 12
    assert cached < before_the_image


def test_a_second_turn_goes_on_from_the_first_one_and_may_have_another_image(family):
    answers(family.runner, [question("Look at this", BLUE)])
    turns = (Message("user", (attached(BLUE), Text("Look at this")), "m"), Message("assistant", (Text("I see"),), "m"))
    for second in (question("And then?", turns=turns), question("And this one?", RED, turns=turns)):
        expected, _ = family.answer(second)
        tokens, (cached,) = answers(family.runner, [second])
        assert tokens == [expected]
        assert cached >= 16


def test_a_long_prompt_with_images_is_prefilled_in_chunks(family):
    long = question("One two three. " * 9, RED, BLUE, turns=(Message("user", (Text("Hello there. " * 9),), "m"),))
    runner = built(family.path, prefix_cache_bytes=0)
    sequence = runner.prepare(runner.preprocess(long), iter(range(9)))[0][0]
    runner.batch.insert([sequence])
    budget = replace(runner.batch.chunk_budget(), tokens=16)
    found = []
    while len(found) < 8:
        found += [token.token for token in runner.batch.decode()]
        runner.batch.prefill(budget)
    runner.batch.remove([sequence.id])
    assert found == family.answer(long)[0]


def test_a_control_token_in_a_text_is_no_image(family):
    placeholder = "<image><|image_pad|>[IMG]<start_of_image>"
    request = question(f"What is {placeholder} there?", RED)
    formatted = family.runner.preprocess(request).formatted
    assert len(formatted.images) == 1
    assert placeholder in formatted.text


def test_a_sequence_with_images_goes_on_after_a_restart(tmp_path):
    runner = built(tiny_vision(tmp_path / "m", "qwen2_5_vl"), prefix_cache_bytes=0)
    expected = answers(runner, [QUESTIONS[2]])[0][0]
    sequence = runner.prepare(runner.preprocess(QUESTIONS[2]), itertools.count())[0][0]
    driver = Driver(runner.batch, sequence)
    driver.until_generated(sequence.id, 4)
    unpublished = runner.batch.restart({sequence.id})
    driver.tokens[sequence.id] += [token.token for token in unpublished]
    assert driver.finish()[sequence.id] == expected


class Broken:
    """Images of a prompt that can't be encoded."""

    shift = 0

    def keys(self, tokens):
        return tokens

    def whole(self, start, end):
        return end

    def encode(self, start, end):
        raise ValueError("no such size")

    def showing(self, start, end):
        raise ValueError("no such size")


def test_an_image_that_a_tower_fails_at_ends_no_other_request_and_is_not_stored(tiny_llama_path):
    runner = built(tiny_llama_path)
    alone = answers(runner, [QUESTIONS[0]])[0][0]
    text = runner.prepare(runner.preprocess(QUESTIONS[0]), itertools.count())[0][0]
    faults = []
    seeing = replace(text, id=7, tokens=text.tokens[:1] * 40, images=GuardedImages(7, Broken(), faults))
    driver = Driver(runner.batch, text, seeing)
    assert driver.finish()[text.id] == alone
    assert [(id, str(fault)) for id, fault in faults] == [(7, "no such size")]
    again = Driver(runner.batch, replace(seeing, images=None))
    again.finish()
    assert again.cached[7] < 16


def test_a_text_model_refuses_images(tiny_llama_path):
    runner = built(tiny_llama_path)
    with pytest.raises(PromptRejected, match="text model") as refusal:
        runner.preprocess(question("What is this?", RED))
    assert refusal.value.param == "messages[0].content[0]"


def test_published_names_of_weights_are_read(tmp_path):
    path = tiny_vision(tmp_path / "m", "smolvlm")
    answer = Reference(path).answer(QUESTIONS[1])[0]
    names = {"language_model.lm_head.": "lm_head.", "language_model.": "model.text_model.", "": "model."}
    weights = mx.load(str(path / "model.safetensors"))
    renamed = {}
    for name, array in weights.items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        renamed[names[prefix] + name.removeprefix(prefix)] = array
    mx.save_safetensors(str(path / "model.safetensors"), renamed, metadata={"format": "mlx"})
    assert answers(built(path), [QUESTIONS[1]])[0] == [answer]


def test_a_broken_vision_part_leaves_a_text_model_unless_it_was_asked_for(tmp_path, caplog):
    path = tiny_vision(tmp_path / "m", "gemma3")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"image_token_index": "none"}))
    assert built(path).facts.kind == "text"
    assert "loaded as a text model" in caplog.text
    with pytest.raises(LoadFailed, match="vision part"):
        built(path, kind="vision")


def test_a_processor_whose_pictures_do_not_fit_the_tower_is_found_at_the_load(tmp_path):
    path = tiny_vision(
        tmp_path / "m", "gemma3", files={"preprocessor_config.json": {"size": {"height": 48, "width": 48}}}
    )
    assert built(path).facts.kind == "text"
    with pytest.raises(LoadFailed, match="vision part"):
        built(path, kind="vision")


@pytest.mark.parametrize("model_type", ["kimi_k25", "mllama", "llava_next"])
def test_a_type_whose_images_are_unsupported_is_refused_by_name(tmp_path, model_type):
    path = tiny_vision(tmp_path / "m", "llava")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert sources.checkpoint_metadata(str(path)).kind == "text"
    with pytest.raises(LoadFailed, match=f"type '{model_type}' are not supported .*gemma3, .*smolvlm are"):
        estimate(ModelSpec("m", str(path), kind="vision"))


def test_a_llama4_sees_the_tiles_of_a_picture_and_behind_them_the_whole(tmp_path):
    runner = built(tiny_vision(tmp_path / "m", "llama4"))
    (seen,) = runner.preprocess(question("Look", BLUE)).formatted.images
    whole = BLUE.resize((56, 56), Image.Resampling.BICUBIC)
    shown = np.asarray(seen.image.inputs["pixel_values"])
    assert shown.shape == (3, 3, 56, 56)
    np.testing.assert_allclose(shown[-1], np.asarray(whole).transpose(2, 0, 1) / 127.5 - 1, atol=1e-5)
    (seen,) = runner.preprocess(question("Look", picture(1, 40, 40))).formatted.images
    assert seen.image.inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_a_text_model_in_another_part_of_a_configuration_is_found(tmp_path):
    path = tiny_vision(tmp_path / "m", "internvl_chat")
    assert "text_config" not in json.loads((path / "config.json").read_text())
    request = QUESTIONS[0]
    text = built(path, kind="text")
    assert text.facts.kind == "text"
    assert answers(text, [request])[0] == [Reference(path).answer(request)[0]]
    (path / "preprocessor_config.json").unlink()
    assert sources.known_kind(str(path)) == "text"


def test_the_kind_of_a_repository_is_found_at_its_first_load(tmp_path, monkeypatch):
    path = tiny_vision(tmp_path / "m", "gemma3")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    with serving_hub(files, tmp_path / "hub", monkeypatch):
        expected = estimate(ModelSpec("m", "org/tiny"))
        runner = built("org/tiny")
    assert runner.facts.kind == "vision"
    assert expected.weights >= runner.facts.weight_bytes > 0


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tiny_vision(tmp_path / "m", "gemma3")
    settings = json.loads((path / "config.json").read_text())
    (path / "code.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="model_file"):
        load_tower(path, settings | {"model_file": "code.py"}, sources.silent, CPU)


def test_the_estimate_counts_the_vision_part_and_not_of_a_text_model(tmp_path):
    path = tiny_vision(tmp_path / "m", "qwen2_5_vl")
    runner = built(path)
    assert estimate(ModelSpec("m", str(path))).weights == runner.facts.weight_bytes
    text = built(path, kind="text")
    assert estimate(ModelSpec("m", str(path), kind="text")).weights == text.facts.weight_bytes
    assert text.facts.weight_bytes < runner.facts.weight_bytes
    stored = sum(array.nbytes for array in mx.load(str(path / "model.safetensors")).values())
    assert estimate(ModelSpec("m", str(path)), METAL).weights == pytest.approx(stored, rel=0.05)


def test_an_image_is_cached_by_its_file_its_detail_and_the_versions_of_what_sees_it(tmp_path):
    path = tiny_vision(tmp_path / "m", "gemma3")
    token = image_token(json.loads((path / "config.json").read_text()))

    def keys(*images, versions="1"):
        processor = ImageProcessor(load_processor(path), token, 1 << 20, versions=versions)
        return [processor.process(each).key for each in images]

    red, blue = attached(RED), attached(BLUE)
    low = replace(red, detail="low")
    key, low_key = keys(red, low)
    assert keys(low, red) == [low_key, key]  # of one file, in any order
    assert len({key, low_key, *keys(blue), *keys(red, versions="2"), *keys(red, versions="")}) == 5


def test_files_are_not_held_beyond_their_prompt(tmp_path):
    path = tiny_vision(tmp_path / "m", "gemma3")
    token = image_token(json.loads((path / "config.json").read_text()))
    processor, image = ImageProcessor(load_processor(path), token, 1 << 20), attached(RED)
    references = sys.getrefcount(image.data)
    count = processor.process(image).tokens
    assert len(processor.place([token] * count, [image])) == 1
    left = sys.getrefcount(image.data)
    assert left == references


def test_the_vision_part_follows_the_settings_of_weights(tmp_path):
    path = tiny_vision(tmp_path / "m", "qwen2_5_vl")
    file, values = path / "model.safetensors", estimate(ModelSpec("m", str(path)), CPU).weights // 4
    mx.save_safetensors(str(file), {name: array.astype(mx.bfloat16) for name, array in mx.load(str(file)).items()})
    spec = ModelSpec("m", str(path), weights="stored")
    assert estimate(spec).weights == pytest.approx(values * 2, rel=0.05)
    assert built(path, weights="stored").facts.weight_bytes == values * 2
    mx.save_safetensors(str(file), {name: array[: len(array) // 4] for name, array in mx.load(str(file)).items()})
    assert estimate(ModelSpec("m", str(path)), CUDA).widened == values * 2
    assert estimate(replace(spec, weights="bfloat16"), CUDA).weights == values * 2


def test_tiles_are_those_that_a_checkpoint_states(tmp_path):
    config = json.loads((tiny_vision(tmp_path / "m", "internvl") / "config.json").read_text())
    for stated, tiles in (({"max_dynamic_patch": 5}, 6), ({"max_dynamic_patch": None}, 13), ({}, 13)):
        whole = {name: value for name, value in config.items() if name != "max_dynamic_patch"} | stated
        assert inspect_vision_architecture(whole).tiles == tiles
    assert sizes_of(tmp_path, "aya_vision").tiles == 4
    assert sizes_of(tmp_path, "llava_onevision").tiles == 5  # of sizes up to two by two


@pytest.mark.parametrize("name", ["gemma3", "smolvlm"])
def test_a_tower_whose_last_layer_is_read_holds_no_outputs_of_others(tmp_path, name):
    model = build_model(json.loads((tiny_vision(tmp_path / "m", name) / "config.json").read_text()))
    tower, pixels = model.vision_tower if name == "gemma3" else model.vision_model, mx.ones((1, 32, 32, 3))
    before, _, states = tower(pixels, output_hidden_states=True)
    keep_last_state(model)
    after, _, none = tower(pixels, output_hidden_states=True)
    assert (len(states), none) == (3, None)
    assert mx.array_equal(before, after)


def sizes_of(tmp_path, name, **vision):
    path = tiny_vision(tmp_path / f"{name}{len(vision)}", name, vision=vision)
    return inspect_vision_architecture(json.loads((path / "config.json").read_text()))


def test_the_outputs_of_layers_and_angles_of_positions_that_a_tower_holds_are_counted(tmp_path):
    few, many = (replace(sizes_of(tmp_path, "llava"), states=layers) for layers in (0, 2))
    assert sizes_of(tmp_path, "llava") == many
    assert many.activation_bytes(4, CPU) - few.activation_bytes(4, CPU) == 2 * 16 * 32 * 4  # layers, patches, values
    assert sizes_of(tmp_path, "gemma3").states == 0
    assert sizes_of(tmp_path, "kimi_vl").activation_bytes(4, CPU) > 512 * 512 * 16 * 18 - 1  # of positions and a head


def test_arrays_that_are_returned_at_once_are_not_counted_twice(tmp_path):
    tile = replace(sizes_of(tmp_path, "smolvlm"), image=4096, tiles=1)
    patches = 512 * 512
    kept, returned = (replace(tile, hidden=LARGEST_KEPT // (patches * 4) + more) for more in (0, 1))
    saved = kept.activation_bytes(4, CPU) - returned.activation_bytes(4, CPU)
    assert saved == (patches * tile.width * 4 if CPU.replace_kernels else 0)


def test_a_large_picture_is_scaled_to_what_was_counted(tmp_path):
    path = tiny_vision(tmp_path / "m", "pixtral")
    runner = built(path)
    most = inspect_vision_architecture(json.loads((path / "config.json").read_text())).most_pixels(CPU)
    assert most is not None
    (seen,) = runner.preprocess(question("Hello", picture(1, 3000, 2000))).formatted.images
    assert seen.image.inputs["pixel_values"].size <= 3 * most


def test_a_checkpoint_without_a_processor_is_a_text_model(tmp_path):
    path = tiny_vision(tmp_path / "m", "qwen3_vl")
    assert sources.known_kind(str(path)) == "vision"
    (path / "preprocessor_config.json").unlink()
    assert sources.known_kind(str(path)) == "text"
    assert built(path).facts.kind == "text"


# What stands for an image where nothing stands behind it. The parts of a message are all that the template shows.
_BARE = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|>", "qwen3_vl": "<|vision_start|><|image_pad|>"}
_BARE |= {"qwen3_5": _BARE["qwen3_vl"], "mistral3": "[IMG]"}
WORDS = "One two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module", params=_BARE)
def bare(request, tmp_path_factory):
    """A model whose template adds nothing to the texts and images of a message."""
    path = tiny_vision(tmp_path_factory.mktemp("bare") / request.param, request.param)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}" + _BARE[request.param] + "{% else %}"
        "{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (path / "chat_template.jinja").unlink(missing_ok=True)
    return SimpleNamespace(path=path, answer=Reference(path).answer, runner=built(path, prefix_cache_bytes=0))


def asked(*parts):
    """A greedy request of texts and pictures in this order."""
    shown = tuple(Text(part) if isinstance(part, str) else attached(part) for part in parts)
    return replace(QUESTIONS[0], prompt=replace(QUESTIONS[0].prompt, conversation=(Message("user", shown, "m"),)))


ARRANGED = {
    "last": (WORDS, RED),
    "first": (RED, WORDS),
    "alone": (BLUE,),
    "adjacent": (WORDS, RED, BLUE, WORDS),
    "adjacent at the end": (WORDS, RED, BLUE),
    "on both sides": (BLUE, WORDS, RED),
}


def test_an_image_may_stand_anywhere_in_a_prompt_and_end_it(bare):
    requests = [asked(*parts) for parts in ARRANGED.values()]
    expected = [bare.answer(each)[0] for each in requests]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert [answers(bare.runner, [each])[0][0] for each in requests] == expected
    assert answers(bare.runner, [QUESTIONS[0], *requests])[0][1:] == expected


def test_an_image_that_ends_a_prompt_is_cached_with_it(bare):
    request, runner = asked(*ARRANGED["last"]), built(bare.path)
    expected, length = bare.answer(request)
    assert answers(runner, [request])[0] == answers(runner, [request])[0] == [expected]
    assert answers(runner, [request])[1] == [length - 1]


@pytest.mark.parametrize("arranged", ["last", "adjacent", "alone"])
def test_a_chunk_may_begin_and_end_anywhere_in_an_image(bare, arranged):
    request = asked(*ARRANGED[arranged])
    expected, length = bare.answer(request)
    prepared = bare.runner.prepare(bare.runner.preprocess(request), itertools.count())[0][0]
    budget = bare.runner.batch.chunk_budget()
    for tokens in range(1, length):
        sequence = replace(prepared, id=tokens)
        bare.runner.batch.insert([sequence])
        found = []
        while len(found) < len(expected):
            found += [token.token for token in bare.runner.batch.decode()]
            bare.runner.batch.prefill(replace(budget, tokens=tokens))
        bare.runner.batch.remove([sequence.id])
        assert found == expected, tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma3"])
def test_prefixes_with_images_are_there_after_a_restart(tmp_path, name):
    """Plain keys and values, states, and windows; another process is another builder."""
    path = tiny_vision(tmp_path / "m", name)
    long = Message("user", (attached(BLUE), Text("Look at this. " * 9)), "m")
    turns = (long, Message("assistant", (Text("I"),), "m"))
    asked = (("a", RED), ("b", RED), ("a", BLUE))
    first, second, other = (question(text, picture, turns=turns) for text, picture in asked)
    expected = [answers(built(path, prefix_cache_bytes=0), [each])[0][0] for each in (first, second, other)]
    cached = []
    for requests in ([first], [first, second, other]):
        disk = DiskTier(tmp_path / "prefixes", 1 << 30)
        runner = Builder(0.25, disk=disk).build(ModelSpec("m", str(path)))
        for each, tokens in zip(requests, expected, strict=False):
            found, (count,) = answers(runner, [each])
            assert found == [tokens]
            cached.append(count)
        disk.flush()
        runner.batch.close()
        disk.close()
    before, again, changed, _ = cached
    assert before == 0
    assert again > 40
    assert changed > 20
