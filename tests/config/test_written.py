"""Models from the command line with all of their fields, and settings that are written as a file and read back."""

import pytest

from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.load import MODEL_FIELDS, build
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import POLICY_FIELDS, ModelSpec, Settings
from mlxserver.config.written import as_toml

DEFAULTS = Settings(models=(ModelSpec("first", "org/first", preload=True), ModelSpec("second", "org/second")))
VALUES = {
    "source": "org/name", "type": "thinking", "adapter": "adapters/x", "preload": "true", "context_length": "65536",
    "min_context": "512", "max_running": "4", "max_waiting": "0", "prefix_cache_bytes": "12MiB",
    "checkpoint_interval": "64", "cache_tokens": "9999", "pin": "1", "ttl": "2.5", "shard": "tensor",
    "unclosed_thinking": "content",
}  # fmt: skip


def value_of(name):
    """A text for a field: a new one needs no change here, but an entry in VALUES if these do not fit."""
    return VALUES.get(name) or next(iter(MODEL_FIELDS[name].choices), "1")


def model(text):
    return build(["--no-defaults", "--model", text], {}, DEFAULTS).models[0]


def refused(text):
    with pytest.raises(ConfigInvalid) as caught:
        model(text)
    return str(caught.value)


def test_a_model_of_a_flag_has_its_fields_behind_commas():
    spec = model("qwen=mlx-community/Qwen3-8B-4bit,context_length=65536,pin=true")
    assert spec == ModelSpec("qwen", "mlx-community/Qwen3-8B-4bit", context_length=65536, pin=True)


@pytest.mark.parametrize("name", [name for name in MODEL_FIELDS if name != "source"])
def test_every_field_of_a_model_is_one_of_a_flag_too(name, tmp_path):
    text = value_of(name)
    spec = model(f"m=org/name,{name}={text}")
    assert getattr(spec, name) == MODEL_FIELDS[name].read(name, text)


@pytest.mark.parametrize("name", MODEL_DEFAULTS)
def test_so_is_every_sampling_parameter(name):
    assert model(f"m=org/name,defaults.{name}=1").defaults == {name: 1}


@pytest.mark.parametrize("name", POLICY_FIELDS)
def test_so_is_every_field_of_the_policy(name, tmp_path):
    spec = model(f"m=org/name,policy.{name}=false")
    assert spec.policy == {name: False}
    assert read_back(tmp_path, Settings(models=(spec,))).models == (spec,)


@pytest.mark.parametrize(
    ("text", "source", "aliases"),
    [
        ("m=org/name,aliases='a,b'", "org/name", ("a", "b")),
        ('m=org/name,aliases="a, gpt-*"', "org/name", ("a", "gpt-*")),
        ("m='./one, two/x',aliases=a", "./one, two/x", ("a",)),
        ('m="it\'s here/x"', "it's here/x", ()),
        ("m=org/name@main=1", "org/name@main=1", ()),
    ],
)
def test_what_has_commas_stands_in_quotes(text, source, aliases):
    assert (model(text).source, model(text).aliases) == (source, aliases)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("m=org/name,context_length=many", "--model m: context_length: 'many' is not valid; expected an integer"),
        ("m=org/name,pin=maybe", "--model m: pin: 'maybe' is not valid; expected true or false"),
        ("m=org/name,type=poet", "expected one of thinking, instruction"),
        ("m=org/name,contxt_length=1", "'contxt_length' is not valid; expected one of type, adapter"),
        ("m=org/name,defaults.heat=1", "'defaults.heat' is not valid; expected one of"),
        ("m=org/name,policy.speed=true", "'policy.speed' is not valid; expected one of"),
        ("m=org/name,policy.pad_slots=1.0", "policy.pad_slots: '1.0' is not valid; expected true or false"),
        (
            "m=org/name,policy.compile_steps=true,policy.pad_slots=false",
            "policy.pad_slots: False is not valid; expected true, which compile_steps needs",
        ),
        ("m=org/name,pad_slots.policy=true", "'pad_slots.policy' is not valid"),
        ("m=org/name,defaults.temperature=3", "defaults.temperature: 3.0" ),
        ("m=org/name,pin", "'pin' is not valid; expected NAME=VALUE"),
        ("m=org/name,pin=true,pin=false", "each field once; pin is there already"),
        ("m=org/name,aliases='a", "a quote at each end"),
        ("m=org/name,aliases=a b", "a list of names"),
        ("m=,pin=true", "is not valid; expected KEY=SOURCE"),
        ("m m=org/name", "KEY=SOURCE, where KEY is a model key"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_what_was_expected(text, named):
    assert named in refused(text)


def read_back(tmp_path, settings):
    path = tmp_path / "written.toml"
    path.write_text(as_toml(settings))
    return build(["--config", str(path)], {}, DEFAULTS)


def test_the_defaults_come_back(tmp_path):
    assert read_back(tmp_path, DEFAULTS) == DEFAULTS


def test_settings_of_all_sources_come_back(tmp_path):
    (tmp_path / "keys").write_text("sk-0123456789\n")
    file = tmp_path / "models.toml"
    file.write_text(
        'api_key_file = ["keys"]\nttl = 5.5\n[models.mine]\nsource = "./mine.gguf"\nadapter = "x"\n'
        '[models.mine.defaults]\ntemperature = 0.25\n[models."odd.key:1"]\nsource = "./quote\\"\\\\\\u007f\\n ä"\n'
    )
    settings = build(
        ["--config", str(file), "--no-defaults", "--model", "m=org/name,aliases='a,gpt-*',ttl=inf,pin=true",
         "--allow-any-model", "--memory-limit", "12GB"],
        {"MLX_SERVER_ALLOW_HOST": "one,two", "MLX_SERVER_LOG_LEVEL": "debug"},
        DEFAULTS,
    )  # fmt: skip
    assert settings.api_key == ("sk-0123456789",)
    assert read_back(tmp_path, settings) == settings


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_every_field_of_a_model_comes_back(name, tmp_path):
    section = {"source": "org/name"} | {name: value_of(name)}
    if name == "adapter":
        section[name] = str(tmp_path / "adapter")
    spec = model(f"m={section.pop('source')}" + "".join(f",{key}={value}" for key, value in section.items()))
    assert read_back(tmp_path, Settings(models=(spec,))).models == (spec,)


def test_keys_are_not_written():
    text = as_toml(build(["--api-key", "sk-secret-0123456789"], {}, DEFAULTS))
    assert "sk-secret" not in text
    assert "# api_key = []  # those that are set are not shown" in text


def test_every_setting_has_its_meaning_above_it():
    lines = as_toml(DEFAULTS).splitlines()
    at = lines.index("default_max_tokens = 4096")
    assert lines[at - 1].startswith("# ") and "states no limit" in " ".join(lines[at - 2 : at])
    assert max(map(len, lines)) <= 120


def test_no_defaults_of_a_file_leaves_the_default_models_out(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text("no_defaults = true")
    assert build(["--config", str(path)], {}, DEFAULTS).models == ()
    path.write_text("no_defaults = 1")
    with pytest.raises(ConfigInvalid, match="no_defaults: 1 is not valid; expected true or false"):
        build(["--config", str(path)], {}, DEFAULTS)
