"""Settings come from file, environment and flags; a wrong one is reported with its place."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.fields import settings_of
from mlxserver.config.load import build
from mlxserver.config.settings import ModelSpec, Settings

DEFAULTS = Settings(models=(ModelSpec("a", "org/a", preload=True), ModelSpec("b", "org/b")))


@pytest.fixture
def written(tmp_path):
    """A function that writes a TOML file and returns the flags that name it."""

    def write(text):
        path = tmp_path / "models.toml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def built(argv=(), environ=None):
    return build(argv, environ or {}, DEFAULTS)


def refused(argv=(), environ=None):
    with pytest.raises(ConfigInvalid) as caught:
        built(argv, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_given_leaves_the_defaults():
    assert built() == DEFAULTS


def test_flags_win_over_environment_over_file(written):
    file = written('port = 1\nhost = "file"\nlog_level = "error"\nstall_target = 1\n')
    settings = built([*file, "--port", "3"], {"MLX_SERVER_PORT": "2", "MLX_SERVER_HOST": "environment"})
    assert (settings.port, settings.host, settings.log_level) == (3, "environment", "error")
    assert type(settings.stall_target) is float


@pytest.mark.parametrize("name", [name for name, setting in settings_of(Settings).items() if not setting.several])
def test_every_scalar_has_a_flag_a_variable_and_a_key(name, written):
    """A setting's own default, given in each way, is the default."""
    value = getattr(DEFAULTS, name)
    assert built([f"--{name.replace('_', '-')}", str(value)]) == DEFAULTS
    assert built(environ={f"MLX_SERVER_{name.upper()}": str(value), "HOME": "/"}) == DEFAULTS
    assert built(written(f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}")) == DEFAULTS
    assert refused([f"--{name.replace('_', '-')}", ""]).startswith(f"--{name.replace('_', '-')}: ''")


def test_models_are_added_by_key(written):
    file = written('[models.b]\nsource = "org/other"\n[models.c]\nsource = "org/c"')
    settings = built([*file, "--model", "c=x=y", "--model", "d=org/d"])
    assert [(spec.key, spec.source) for spec in settings.models] == [
        ("a", "org/a"), ("b", "org/other"), ("c", "x=y"), ("d", "org/d"),
    ]  # fmt: skip


def test_the_defaults_can_be_left_out():
    assert built(["--no-defaults", "--model", "c=org/c"]).models == (ModelSpec("c", "org/c"),)


def test_a_section_sets_every_field_of_a_model(written):
    section = '[models."org/x:1"]\nsource = "org/x"\ntype = "thinking"\npreload = true\ncontext_length = 512\n'
    spec = built(["--no-defaults", *written(section + "max_running = 2\nmax_waiting = 0")]).models[0]
    assert spec == ModelSpec("org/x:1", "org/x", "thinking", None, True, 512, max_running=2, max_waiting=0)


def test_paths_are_relative_to_the_file(written, tmp_path):
    (tmp_path / "here").mkdir()
    sources = ["here", "./later", "x/y.gguf", "/abs/y.gguf", "org/name", "embedded:smollm2", "~/x.gguf", "n" * 5000]
    file = written("".join(f'[models.m{i}]\nsource = "{s}"\nadapter = "ad"\n' for i, s in enumerate(sources)))
    models = built(["--no-defaults", *file]).models
    assert [spec.source for spec in models] == [
        str(tmp_path / "here"), str(tmp_path / "later"), str(tmp_path / "x/y.gguf"), "/abs/y.gguf", *sources[4:],
    ]  # fmt: skip
    assert {spec.adapter for spec in models} == {str(tmp_path / "ad")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "65536"], "--port: 65536 is not valid; expected an integer from 0 to 65535."),
        (["--port", "-1"], "--port: -1 is not valid"),
        (["--port", "eighty"], "--port: 'eighty' is not valid; expected an integer from 0 to 65535."),
        (["--port", "9" * 5000], "--port: '999"),
        (["--port"], "argument --port: expected one argument"),
        (["--log-level", "loud"], "--log-level: 'loud' is not valid; expected one of critical, error, warning, info"),
        (["--stall-target", "nan"], "--stall-target: nan"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout: inf"),
        (["--host", " "], "--host: ' ' is not valid; expected a non-empty string"),
        (["--model", "a"], "--model: 'a' is not valid; expected KEY=SOURCE"),
        (["--model", "a="], "--model: 'a='"),
        (["--model", "=x"], "--model: '=x'"),
        (["--model", "a b=x"], "--model: 'a b=x'"),
        (
            ["--prot", "1"],
            "unrecognized arguments: --prot 1' is not valid; expected flags as --help shows them; is it --port?",
        ),
        (["--confg=x"], "is it --config?"),
        (["--conf", "x"], "unrecognized arguments: --conf x"),
        (["stray"], "unrecognized arguments: stray"),
        (
            ["--config", "/nowhere.toml"],
            "'/nowhere.toml' is not valid; expected a TOML file (No such file or directory)",
        ),
        (["--config", "/"], "--config: '/' is not valid"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(argv, message):
    assert message in refused(argv)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MLX_SERVER_PORT": "x"}, "MLX_SERVER_PORT: 'x' is not valid; expected an integer from 0 to 65535."),
        ({"MLX_SERVER_PROT": "1"}, "environment: 'MLX_SERVER_PROT' is not valid; expected one of MLX_SERVER_HOST"),
    ],
)
def test_a_wrong_variable_is_reported_by_name(environ, message):
    assert message in refused(environ=environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = '80'", "models.toml: port: '80' is not valid; expected an integer from 0 to 65535."),
        ("port = true", "models.toml: port: True"),
        ("port = 80.0", "models.toml: port: 80.0"),
        ("stall_target = 1" + "0" * 400, "models.toml: stall_target: 1000"),
        ("prot = 1", "models.toml: 'prot' is not valid; expected one of host"),
        ('"a\\nb" = 1', "models.toml: 'a\\nb' is not valid"),
        ("models = 1", "models.toml: models: 1"),
        ("models.a = 1", "models.toml: models.a: 1"),
        ("[models.'a b']", "models.toml: models: 'a b' is not valid; expected a model key"),
        ("[models.a]", "models.toml: models.a.source: None"),
        ("[models.a]\nsource = 5", "models.toml: models.a.source: 5"),
        ("[models.a]\nsource = 'x'\nkey = 'b'", "models.toml: models.a: 'key' is not valid; expected one of source"),
        ("[models.a]\nsource = 'x'\ntype = 'chat'", "models.toml: models.a.type: 'chat' is not valid; expected one of"),
        ("[models.a]\nsource = 'x'\npreload = 1", "models.toml: models.a.preload: 1 is not valid; expected true or"),
        (
            "[models.a]\nsource = 'x'\ncontext_length = 0",
            "models.a.context_length: 0 is not valid; expected an integer",
        ),
        ("x = [", "is not valid; expected a TOML file"),
        ("x = " + "[" * 5000, "is not valid; expected a TOML file"),
    ],
)
def test_a_wrong_line_of_the_file_is_reported_with_its_place(text, message, written):
    assert message in refused(written(text))


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        built(["-h"])
    assert caught.value.code == 0
    assert {"--host", "--port", "--model", "--no-defaults", "--config", "--log-level"} <= set(
        re.findall(r"--[a-z-]+", capsys.readouterr().out)
    )


@given(st.lists(st.sampled_from(["--port", "--host", "--model", "--no-defaults", "--", "=", "80", "a=b"]) | st.text()))
def test_any_command_line_is_settings_or_one_error(argv):
    try:
        built([argument for argument in argv if argument not in ("-h", "--help")])
    except (ConfigInvalid, SystemExit):
        return


def test_the_place_of_the_cache_is_no_setting_and_no_error():
    """loading/gguf.py reads it."""
    assert build([], {"MLX_SERVER_CACHE": "/somewhere"}, Settings()) == Settings()


def test_keys_come_from_flags_variables_and_files_together(written, tmp_path):
    (tmp_path / "keys").write_text("# a team\n\n  from-the-file \n")
    file = written('api_key_file = ["keys"]\nallow_origin = ["https://a.example", "*"]')
    settings = built(
        [*file, "--api-key", "from-a-flag", "--api-key", "another-flag"],
        {"MLX_SERVER_ADMIN_KEY": "one-admin,two-admin"},
    )
    assert settings.api_key == ("from-a-flag", "another-flag", "from-the-file")
    assert settings.admin_key == ("one-admin", "two-admin")
    assert settings.allow_origin == ("https://a.example", "*")


@pytest.mark.parametrize("key", ["short-1", "with spaces in it", "x" * 513, "ümlaut-key", ""])
def test_a_wrong_key_is_refused_and_not_shown(key, written, tmp_path):
    (tmp_path / "keys").write_text(key + "\n")
    for message in (
        refused(["--api-key", key]),
        refused(environ={"MLX_SERVER_ADMIN_KEY": f"right-enough,{key}"}),
        refused(written(f'api_key = ["{key}"]')),
        refused(["--api-key-file", str(tmp_path / "keys")]),
    ):
        assert "key" in message
        assert not key or key not in message
    assert "from" not in repr(built(["--api-key", "secret-from-a-flag"]).api_key_file)


def test_settings_do_not_show_their_keys():
    assert "a-secret" not in repr(built(["--api-key", "a-secret-key", "--admin-key", "a-secret-too"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--api-key-file", "/nowhere"], "api_key_file: '/nowhere' is not valid; expected a file with keys"),
        (["--allow-origin", "example.org"], "--allow-origin: ['example.org'] is not valid; expected origins"),
        (["--allow-host", "http://x"], "--allow-host: ['http://x'] is not valid; expected names"),
    ],
)
def test_a_wrong_list_is_one_clear_line(argv, message):
    assert message in refused(argv)
