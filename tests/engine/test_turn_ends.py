"""The ends of a turn come from config.json, generation_config.json, the tokenizer and the chat template together."""

import json
import logging

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading.loader import load
from tools.harness.models import scripted_model

END, OTHER, RETURN, CALL, KNOWN = "<|end|>", "<|other|>", "<|return|>", "<|call|>", "<end_of_turn>"
ENDS = {
    "plain": "<|end|>\n",
    "closed": "\n<|end|>\n{% if loop.last %}<|im_end|>{% endif %}",
    "marked": "<|other|><|end|>",
    "prompting": "<|end|><|im_start|>assistant<|other|>",
    "worded": " over<|end|>\n",
    "beginning": "<|im_start|>",
    "last": "{{ '<|return|>' if loop.last else '<|end|>' }}",
    "between": "<|end|>{% for call in m.tool_calls or [] %}{{ call.function.name }}<|other|>{% endfor %}",
    "none": "",
    "broken": "{{ raise_exception('no') }}",
}
TEMPLATE = "{%% for m in messages %%}{{ m.content }}{%% if m.role == 'assistant' %%}%s{%% endif %%}{%% endfor %%}"


@pytest.fixture
def model(tmp_path):
    """A model with more special tokens, whose files may be changed."""
    return scripted_model(tmp_path / "model", {"hello": "Hi."}, tokens=[END, OTHER, RETURN])


def change(model, name, *without, **fields):
    content = json.loads((model / name).read_text()) | fields
    (model / name).write_text(json.dumps({name: value for name, value in content.items() if name not in without}))


def names_of(loaded):
    return {loaded.tokenizer.convert_ids_to_tokens(number) for number in loaded.tokenizer.eos_token_ids}


def ends(model):
    """The texts of the ends of a model that is loaded."""
    return names_of(load(ModelSpec("m", str(model))))


def id_of(model, token):
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    return next(one["id"] for one in added if one["content"] == token)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("plain", {END}),
        ("closed", {END}),
        ("marked", {END}),
        ("prompting", set()),
        ("worded", set()),
        ("beginning", set()),
        ("last", {RETURN}),
        ("between", set()),
        ("none", set()),
        ("broken", set()),
    ],
)
def test_the_special_token_that_a_template_writes_behind_an_answer_is_an_end(model, template, written):
    change(model, "tokenizer_config.json", chat_template=TEMPLATE % ENDS[template])
    assert ends(model) == {"<|im_end|>"} | written


def test_the_ends_of_all_files_count(model):
    change(model, "config.json", eos_token_id=id_of(model, END))
    change(model, "generation_config.json", eos_token_id=[id_of(model, OTHER), id_of(model, RETURN)])
    assert ends(model) == {"<|im_end|>", END, OTHER, RETURN}


def test_a_nested_configuration_may_state_the_end(model):
    change(model, "config.json", "eos_token_id", text_config={"eos_token_id": id_of(model, END)})
    assert ends(model) == {"<|im_end|>", END}


def test_an_end_may_be_stated_by_its_text(model):
    change(model, "generation_config.json", eos_token_id=["<|end|>", "<|other|>"])
    assert ends(model) == {"<|im_end|>", END, OTHER}


def test_a_known_end_counts_where_the_configuration_is_still_the_base_models(tmp_path):
    """ChatML in the template, and <|endoftext|> as the end in all files; and an end that no file names."""
    model = scripted_model(tmp_path / "model", {"hello": "Hi."}, tokens=["<|endoftext|>", KNOWN])
    change(model, "tokenizer_config.json", eos_token="<|endoftext|>", chat_template="{{ messages[-1].content }}")
    for name in ("config.json", "generation_config.json"):
        change(model, name, eos_token_id=id_of(model, "<|endoftext|>"))
    assert ends(model) == {"<|endoftext|>", "<|im_end|>", KNOWN}


@pytest.mark.parametrize(("tokens", "found"), [([RETURN, CALL], {RETURN, CALL}), ([CALL], set())])
def test_harmonys_ends_count_where_both_are_there(tmp_path, tokens, found):
    """<|end|> ends a message there, not the turn."""
    model = scripted_model(tmp_path / "model", {"hello": "Hi."}, tokens=[END, *tokens])
    assert ends(model) == {"<|im_end|>"} | found


@pytest.mark.parametrize(
    ("stated", "fault"),
    [
        (10**6, "is 1000000; expected a token id below"),
        (-1, "is -1; expected a token id"),
        (True, "is True; expected a token id"),
        (1.5, "is 1.5; expected a token id"),
        ("</s>", "is '</s>'; expected a token id"),
        ({"a": 1}, "is {'a': 1}; expected a token id"),
        ([[2]], "is [2]; expected a token id"),
        ([None], "is None; expected a token id"),
        (100, "the ordinary token '"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_end_is_left_out_with_a_warning(model, caplog, file, stated, fault):
    change(model, file, eos_token_id=stated)
    with caplog.at_level(logging.WARNING, "engine"):
        assert ends(model) == {"<|im_end|>"}
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "engine"]
    assert warning.startswith(f"{model / file}: eos_token_id is ")
    assert fault in warning


def test_an_end_that_is_not_in_the_vocabulary_is_left_out(model, caplog):
    change(model, "tokenizer_config.json", eos_token="<nowhere>", chat_template="{{ messages[-1].content }}")
    with caplog.at_level(logging.WARNING, "engine"):
        assert ends(model) == {"<|im_end|>"}
    assert "expected a token id below" in caplog.text


def test_right_ids_beside_wrong_ones_count(model):
    change(model, "generation_config.json", eos_token_id=["x", None, id_of(model, END), 10**9])
    assert ends(model) == {"<|im_end|>", END}


def test_a_model_without_any_end_loads_with_a_warning(model, caplog):
    for name in ("config.json", "generation_config.json"):
        change(model, name, "eos_token_id")
    change(model, "tokenizer_config.json", "eos_token", chat_template="{{ messages[-1].content }}")
    tokenizer = json.loads((model / "tokenizer.json").read_text().replace("<|im_end|>", "<|x|>"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with caplog.at_level(logging.WARNING, "engine"):
        assert ends(model) == set()
    assert "no token ends its answers" in caplog.text
