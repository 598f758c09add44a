"""What is wrong in a checkpoint's files, and not needed, is left out with a warning; the checkpoint stays as it is."""

import json
import logging
import shutil

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading.checkpoint_files import checked
from mlxserver.engine.loading.loader import generation_defaults, load

TOKEN = 'expected a text, or an object with the text as its "content"'
TEMPLATE = 'expected a text, or a list of objects with "name" and "template"'
LENGTH = "expected a number more than 0"
ID = "expected a token id or a list of them"


@pytest.fixture
def model(tiny_llama_path, tmp_path):
    """A copy of the tiny llama, to be damaged."""
    return shutil.copytree(tiny_llama_path, tmp_path / "model")


def set_fields(model, name, **fields):
    path = model / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def loaded(model, caplog):
    """The loaded model, and the warnings about its files."""
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with caplog.at_level(logging.WARNING, "engine"):
        model = load(ModelSpec("m", str(model)))
    assert model.path.is_dir()
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == before
    return model, [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]


def test_a_good_checkpoint_is_read_where_it_is(model, caplog):
    with checked(model) as files:
        assert files == model
    assert loaded(model, caplog)[1] == []


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is no JSON: Expecting property name"),
        (b"\xff\xfe{", "is no JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is []; expected an object"),
        (b"null", "is None; expected an object"),
        (b'"x"', "is 'x'; expected an object"),
    ],
)
def test_a_file_that_the_model_works_without_is_left_out(model, caplog, name, content, fault):
    (model / name).write_bytes(content)
    one, (warning,) = loaded(model, caplog)
    assert warning.startswith(f"{model}: {name} {fault}")
    assert one.tokenizer.decode(one.tokenizer.encode("Hello")) == "Hello"
    assert one.tokenizer.eos_token_ids == {1}
    assert one.generation_defaults == {}


@pytest.mark.parametrize("content", ["{", "[]", "5"])
def test_a_tokenizer_config_that_can_not_be_read_fails_the_load_with_its_name(model, content):
    """Without it there is no chat template: answers would be nonsense."""
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(LoadFailed, match="the tokenizer in .* can't be read: tokenizer_config.json is "):
        load(ModelSpec("m", str(model)))


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token"])
@pytest.mark.parametrize("value", [5, True, ["x"], {"x": 1}, 1.5])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_token_of_the_wrong_type_is_left_out(model, caplog, file, name, value):
    set_fields(model, file, **{name: value})
    with caplog.at_level(logging.WARNING, "engine"), checked(model) as files:
        assert name not in json.loads((files / file).read_text())
        assert (files / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not files.exists()
    (record,) = caplog.records
    assert record.getMessage() == f"{model / file}: {name} is {value!r}; {TOKEN}. It is left out."


@pytest.mark.parametrize(
    ("file", "fields", "warnings"),
    [
        ("special_tokens_map.json", {"pad_token": 5, "x": 1}, [f"pad_token is 5; {TOKEN}"]),
        ("tokenizer_config.json", {"pad_token": {"content": "<|im_end|>", "__type": "AddedToken"}}, []),
        ("tokenizer_config.json", {"eos_token": None, "model_max_length": None}, []),
        ("tokenizer_config.json", {"model_max_length": "long"}, [f"model_max_length is 'long'; {LENGTH}"]),
        ("tokenizer_config.json", {"model_max_length": -1}, [f"model_max_length is -1; {LENGTH}"]),
        ("tokenizer_config.json", {"chat_template": 5}, [f"chat_template is 5; {TEMPLATE}"]),
        ("tokenizer_config.json", {"chat_template": [5]}, [f"chat_template is [5]; {TEMPLATE}"]),
        ("config.json", {"pad_token_id": "x"}, [f"pad_token_id is 'x'; {ID}"]),
        ("config.json", {"bos_token_id": -1}, [f"bos_token_id is -1; {ID}"]),
    ],
)  # fmt: skip
def test_a_model_loads_without_its_wrong_fields(model, caplog, file, fields, warnings):
    set_fields(model, file, **fields)
    one, logged = loaded(model, caplog)
    assert logged == [f"{model / file}: {warning}. It is left out." for warning in warnings]
    assert one.tokenizer.encode("Hello there")
    assert one.tokenizer.eos_token_ids == {1}


@pytest.mark.parametrize(
    ("stated", "taken", "left_out"),
    [
        ({"temperature": 0.6, "top_k": 20.0, "min_p": 0}, {"temperature": 0.6, "top_k": 20, "min_p": 0.0}, []),
        ({"temperature": "hot"}, {}, ["temperature"]),
        ({"temperature": float("nan"), "top_p": float("inf")}, {}, ["temperature", "top_p"]),
        ({"temperature": True, "top_p": 0, "top_k": 1.5}, {}, ["temperature", "top_p", "top_k"]),
        ({"top_k": -1, "repetition_penalty": 1.1}, {"top_k": -1, "repetition_penalty": 1.1}, []),
        ({"top_k": 10**400, "repetition_penalty": 0}, {}, ["top_k", "repetition_penalty"]),
        ({"top_k": None, "top_p": None, "max_new_tokens": "x"}, {}, []),
        ({"top_p": [0.9], "min_p": {"x": 1}}, {}, ["top_p", "min_p"]),
        ({"do_sample": False}, {"temperature": 0.0}, []),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}, []),
        ({"do_sample": "no"}, {}, []),
    ],
)
def test_makers_defaults_pass_the_bounds_of_a_request(model, caplog, stated, taken, left_out):
    (model / "generation_config.json").write_text(json.dumps(stated))
    with caplog.at_level(logging.WARNING, "engine"):
        assert generation_defaults(model) == taken
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(left_out)
    for name in left_out:
        assert any(f"generation_config.json: {name}" in message and "xpected" in message for message in messages), name
