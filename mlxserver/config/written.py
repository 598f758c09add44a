"""Settings as a commented TOML file, which load.read_file() reads back to the same settings.

Rule: keys are not written. Those of key files come back with the files, which are named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from mlxserver.config.fields import Setting, settings_of
from mlxserver.config.load import NESTED
from mlxserver.config.settings import ModelSpec, Settings

WIDTH = 116
PATHS = ("api_key_file", "admin_key_file", "model_dirs")
HEAD = """# Settings of the Multi-Model MLX Server, as they are in force. Use: mlx-server --config FILE
# A flag (--port) wins over the environment (MLX_SERVER_PORT), the environment over this file."""


def as_toml(settings: Settings) -> str:
    """The file. Paths in it are absolute, so that it may lie anywhere."""
    parts = [HEAD, "no_defaults = true  # the models are all below"]
    parts += ["\n".join(_setting(settings, name, setting)) for name, setting in settings_of(Settings).items()]
    parts += ["\n".join(_model(spec)) for spec in settings.models]
    return "\n\n".join(parts) + "\n"


def _setting(settings: Settings, name: str, setting: Setting) -> Iterator[str]:
    value = getattr(settings, name)
    expected = "" if setting.expected in setting.meaning else f" ({setting.expected})"
    yield from (f"# {line}" for line in wrap(f"{setting.meaning}{expected}", WIDTH))
    if setting.is_secret:
        kept = "none is set" if not value else "those that are set are not shown; name a file in the setting below"
        yield f"# {name} = []  # {kept}"
        return
    if name in PATHS:
        value = [_absolute(path) for path in value]
    yield f"{name} = {_value(value)}"


def _model(spec: ModelSpec) -> Iterator[str]:
    """The section of a model, with what differs from the defaults of a model."""
    yield f"[models.{_key(spec.key)}]"
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in ("key", *NESTED) or value == field.default or (field.default is MISSING and not value):
            continue
        is_path = field.name == "adapter" or (field.name == "source" and _is_local(value))
        yield f"{field.name} = {_value(_absolute(value) if is_path else value)}"
    for part in NESTED:
        if nested := getattr(spec, part):
            yield f"\n[models.{_key(spec.key)}.{part}]"
            yield from (f"{name} = {_value(value)}" for name, value in nested.items())


def _is_local(source: str) -> bool:
    try:
        return source.startswith(("./", "../")) or source.endswith(".gguf") or Path(source).exists()
    except OSError:  # too long to be a file's name
        return False


def _absolute(path: str) -> str:
    return path if path.startswith("~") else str(Path(path).absolute())


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    """A value in TOML. Its texts are those of JSON, which escapes all but one of the characters that TOML forbids."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
