"""Sources of settings: a TOML file, environment variables, and flags. A later one wins.

Invariants
1. Each source is read to plain checked values by field name; build() lays them over the defaults.
2. Unknown names are refused, and a wrong value is reported with its place: "--port", "MLX_SERVER_PORT",
   "models.toml: models.foo.type".
3. Models are merged by key. A model that is named again replaces the one before.
4. No message shows a key, or a part of one.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from mlxserver.config.aliases import clash, is_pattern
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.fields import EXPECTATIONS, Setting, settings_of
from mlxserver.config.model_texts import split_model
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import POLICY_FIELDS, ModelSpec, Settings

SETTINGS = settings_of(Settings)
MODEL_FIELDS = {name: setting for name, setting in settings_of(ModelSpec).items() if name != "key"}
NESTED = {"defaults": MODEL_DEFAULTS, "policy": POLICY_FIELDS}
SECTION = [*MODEL_FIELDS, "aliases", *NESTED]
ENVIRONMENT = {f"MLX_SERVER_{name.upper()}": name for name in SETTINGS}
FLAGS = {f"--{name.replace('_', '-')}": name for name in SETTINGS}
KEY_FILES = {"api_key_file": "api_key", "admin_key_file": "admin_key"}
CACHE_VARIABLE = "MLX_SERVER_CACHE"  # no setting: engine/platform/folders.py reads it
MODEL_KEY = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
CHECK = "--check-config"
OWN_FLAGS = ("--model", "--no-defaults", "--config", CHECK)  # beside those of settings
USAGE = "mlx-server [serve] [FLAGS]\n       mlx-server config [FLAGS] [--json]"
NO_DEFAULTS = "no_defaults"  # of a file: as the flag
ALIAS = re.compile(r"[A-Za-z0-9._:/*?!\[\]-]{1,128}")
MODEL_HELP = "add a model; more settings of it follow behind commas (repeatable)"
KEY_EXPECTED = "a model key: 1 to 128 letters, digits or any of . _ : / -"


def build(argv: Sequence[str], environ: Mapping[str, str], defaults: Settings) -> Settings:
    """Settings from the command line, without the program's name, over environ, over the file, over defaults.

    -h prints the help and exits. Raises ConfigInvalid.
    """
    arguments = vars(parser(defaults).parse_args(list(argv)))
    file: dict[str, Any] = {} if arguments["config"] is None else read_file(Path(arguments["config"]))
    given = {flag: arguments[name] for flag, name in FLAGS.items() if arguments[name] is not None}
    flags = {FLAGS[flag]: SETTINGS[FLAGS[flag]].read(flag, text) for flag, text in given.items()}
    models = [
        *(() if arguments["no_defaults"] or file.get(NO_DEFAULTS) else defaults.models),
        *file.pop("models", ()),
        *map(_named_model, arguments["model"]),
    ]
    file.pop(NO_DEFAULTS, None)
    unique = tuple({spec.key: spec for spec in models}.values())
    _check_aliases(unique)
    return _with_key_files(replace(defaults, **{**file, **read_environment(environ), **flags, "models": unique}))


def only_checks(argv: Sequence[str]) -> bool:
    """Whether a command line that build() accepts asks for a check of the settings alone."""
    return CHECK in argv


# -- sources ----------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a TOML file by field name, models as ModelSpecs. Raises ConfigInvalid."""
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigInvalid("--config", str(path), f"a TOML file ({reason})") from None
    sections = document.pop("models", {})
    if not isinstance(sections, dict):
        raise ConfigInvalid(f"{path}: models", sections, "sections named [models.KEY]")
    no_defaults = document.pop(NO_DEFAULTS, False)
    if not isinstance(no_defaults, bool):
        raise ConfigInvalid(f"{path}: {NO_DEFAULTS}", no_defaults, EXPECTATIONS[bool])
    for name in document:
        if name not in SETTINGS:
            raise ConfigInvalid(str(path), name, f"one of {', '.join(SETTINGS)}, or [models.KEY]")
    values = {name: SETTINGS[name].check(f"{path}: {name}", value) for name, value in document.items()}
    for name in values.keys() & {*KEY_FILES, "model_dirs"}:
        values[name] = tuple(str(path.parent / Path(written).expanduser()) for written in values[name])
    left_out = {NO_DEFAULTS: True} if no_defaults else {}
    return {**values, **left_out, "models": [_section(path, key, section) for key, section in sections.items()]}


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the environment by field name. Raises ConfigInvalid, for an unknown MLX_SERVER_ name too."""
    given = {name: text for name, text in environ.items() if name.startswith("MLX_SERVER_") and name != CACHE_VARIABLE}
    for name in given:
        if name not in ENVIRONMENT:
            raise ConfigInvalid("environment", name, f"one of {', '.join(ENVIRONMENT)}")
    return {ENVIRONMENT[name]: SETTINGS[ENVIRONMENT[name]].read(name, text) for name, text in given.items()}


def parser(defaults: Settings) -> argparse.ArgumentParser:
    """Parser of the flags. Its errors are ConfigInvalid.

    Values stay text, so that Setting.read() checks them as it does the environment's."""
    parser: argparse.ArgumentParser = _Parser(
        prog="mlx-server",
        usage=USAGE,
        description="Serve local models through the APIs of OpenAI, Anthropic and Ollama; or print the settings.",
        epilog="Commands beside it: ls, show, ps, search, pull, rm, config, doctor, service, launch, completions.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", action="append", default=[], metavar="KEY=SOURCE[,NAME=VALUE]", help=MODEL_HELP)
    parser.add_argument("--no-defaults", action="store_true", help="leave the default models out")
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same settings")
    parser.add_argument(CHECK, action="store_true", help="check the settings, and exit")
    for flag, name in FLAGS.items():
        setting, default = SETTINGS[name], getattr(defaults, name)
        if setting.several:
            parser.add_argument(flag, action=_Append, help=f"{setting.meaning} (repeatable; {setting.expected})")
            continue
        metavar = "{" + ",".join(map(str, setting.choices)) + "}" if setting.choices else setting.type.__name__.upper()
        bare: dict[str, str] = {"nargs": "?", "const": "true"} if setting.type is bool else {}
        text = f"{setting.meaning} (default {default}; {setting.expected})"
        parser.add_argument(flag, metavar=metavar, help=text, **bare)  # type: ignore[arg-type]
    return parser


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are ConfigInvalid."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        near = get_close_matches(unknown, [*FLAGS, *OWN_FLAGS], 1)
        hint = f"; is it {near[0]}?" if near and near[0] != unknown else ""
        raise ConfigInvalid("command line", message, f"flags as --help shows them{hint}")


class _Append(argparse.Action):
    """A flag that may be repeated: its texts with commas between them, as a variable has them."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        """Add one text."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


# -- models -----------------------------------------------------------------------------------------------------------


def _named_model(text: str) -> ModelSpec:
    """The model of a --model KEY=SOURCE,NAME=VALUE,...; `defaults.temperature` names a sampling parameter,
    `policy.pad_slots` a field of the policy.
    """
    key, source, texts = split_model("--model", text)
    if not MODEL_KEY.fullmatch(key):
        raise ConfigInvalid("--model", text, f"KEY=SOURCE, where KEY is {KEY_EXPECTED}")
    place = f"--model {key}"
    section: dict[str, Any] = {"source": source}
    for name, value in texts.items():
        part, _, parameter = name.rpartition(".")
        known = NESTED.get(part, {}) if part else MODEL_FIELDS
        if parameter in known and name != "source":
            read = known[parameter].read(f"{place}: {name}", value)
        elif name == "aliases":
            read = [alias.strip() for alias in value.split(",")]
        else:
            names = [own for own in SECTION if own != "source" and own not in NESTED]
            names += [f"{own}.{each}" for own in NESTED for each in NESTED[own]]
            raise ConfigInvalid(place, name, f"one of {', '.join(names)}")
        (section.setdefault(part, {}) if part else section)[parameter] = read
    return _spec(place, key, section)


def _section(path: Path, key: str, section: object) -> ModelSpec:
    """The model of a [models.KEY]."""
    place = f"{path}: models.{key}"
    if not MODEL_KEY.fullmatch(key):
        raise ConfigInvalid(f"{path}: models", key, KEY_EXPECTED)
    if not isinstance(section, dict):
        raise ConfigInvalid(place, section, f"a section [models.{key}]")
    if "source" not in section:
        raise ConfigInvalid(f"{place}.source", None, MODEL_FIELDS["source"].expected)
    spec = _spec(place, key, section)
    paths: dict[str, Any] = dict(_located({"source": spec.source, "adapter": spec.adapter}, path.parent))
    return replace(spec, **paths)


def _spec(place: str, key: str, section: Mapping[str, Any]) -> ModelSpec:
    """The model of a section that has a source. Raises ConfigInvalid."""
    fields = _checked(place, section, MODEL_FIELDS, SECTION)
    aliases = _aliases(f"{place}.aliases", section.get("aliases", []))
    for name, known in NESTED.items():
        nested = section.get(name, {})
        if not isinstance(nested, dict):
            raise ConfigInvalid(f"{place}.{name}", nested, f"a section [models.{key}.{name}]")
        fields[name] = _checked(f"{place}.{name}", nested, known, [*known])
    if fields["policy"].get("compile_steps") and fields["policy"].get("pad_slots") is False:
        raise ConfigInvalid(f"{place}.policy.pad_slots", False, "true, which compile_steps needs")
    return ModelSpec(key, **fields, aliases=aliases)


def _checked(
    place: str, section: Mapping[str, Any], settings: Mapping[str, Setting], known: Sequence[str]
) -> dict[str, Any]:
    """Values of a section that are in `settings`. Refuses names that are not known."""
    for name in section:
        if name not in known:
            raise ConfigInvalid(place, name, f"one of {', '.join(known)}")
    return {name: settings[name].check(f"{place}.{name}", section[name]) for name in section if name in settings}


def _aliases(place: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and is_alias(name) for name in value):
        raise ConfigInvalid(place, value, f"a list of names, each like {KEY_EXPECTED}, or of patterns such as 'gpt-*'")
    return tuple(value)


def is_alias(name: str) -> bool:
    """Whether a text can be an alias: a name, or a pattern of names."""
    return (ALIAS if is_pattern(name) else MODEL_KEY).fullmatch(name) is not None


def _check_aliases(models: Sequence[ModelSpec]) -> None:
    """Refuse a name with two meanings."""
    owners = {spec.key: spec.key for spec in models}
    for spec in models:
        for alias in spec.aliases:
            taken = next((name for name, owner in owners.items() if owner != spec.key and clash(name, alias)), None)
            if taken:
                which = "" if taken == alias else f" with {taken!r}"
                expected = f"a name that {owners[taken]!r} has not taken{which}"
                raise ConfigInvalid(f"models.{spec.key}.aliases", alias, expected)
            owners.setdefault(alias, spec.key)


def _located(fields: Mapping[str, Any], directory: Path) -> Iterator[tuple[str, str]]:
    """Paths among a model's source and adapter, relative to the file's directory. A Hugging Face id is no path."""
    for name, written in fields.items():
        if written is None:
            continue
        path = directory / written
        is_path = name == "adapter" or written.startswith(("./", "../")) or written.endswith(".gguf") or _exists(path)
        if is_path and not written.startswith("~"):
            yield name, str(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long to be a file's name, or in a directory that can't be read
        return False


# -- key files --------------------------------------------------------------------------------------------------------


def _with_key_files(settings: Settings) -> Settings:
    """The settings with the keys of their files added."""
    for files, keys in KEY_FILES.items():
        found = [key for name in getattr(settings, files) for key in _read_keys(files, Path(name).expanduser(), keys)]
        changed: dict[str, Any] = {keys: tuple(dict.fromkeys((*getattr(settings, keys), *found)))}
        settings = replace(settings, **changed)
    return settings


def _read_keys(setting: str, path: Path, keys: str) -> list[str]:
    """Keys of a file, one per line. Empty lines and lines that begin with # are comments."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigInvalid(setting, str(path), f"a file with keys ({reason})") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigInvalid(setting, str(path), "a file with at least one key")
    return list(SETTINGS[keys].check(f"{setting}: {path}", found))
