"""Validators of parameters that have a structure or a syntax of their own.

Rule: a validator takes (value, param), returns the value that handlers see, and raises ValidationFailed.
"""

from __future__ import annotations

import math
import re
from typing import Any

from mlxserver.api.schema.json_schema import check_shape, without_nulls
from mlxserver.api.schema.parameters import invalid

KEY = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_STOPS = 1024  # of any server; this one may set a lower limit (api/schema/limits.py)
NUMBER = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,12})?")
DURATION = re.compile(r"-?([0-9]{1,12}(\.[0-9]{1,12})?(ms|h|m|s))+")
DURATION_PART = re.compile(r"([0-9.]+)(ms|h|m|s)")
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

STREAM_OPTIONS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "include_usage": {"type": ["boolean", "null"]},
        "continuous_usage_stats": {"type": ["boolean", "null"]},
        "include_obfuscation": {
            "type": ["boolean", "null"],
            "enum": [False, None],
            "description": "false: streams are never obfuscated",
        },
    },
    "additionalProperties": False,
}


def check_stop(value: Any, param: str) -> tuple[str, ...]:
    """Stop strings, from one string or a list of them."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise invalid(param, value, f"a string or a list of up to {MAX_STOPS} strings")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            raise invalid(param if stops is not value else f"{param}[{index}]", stop, "a non-empty string")
    return tuple(stops)


def check_stream_options(value: Any, param: str) -> dict[str, bool]:
    """The options that were given. Raises ValidationFailed."""
    check_shape(value, STREAM_OPTIONS, param)
    return without_nulls(value)


def check_modalities(value: Any, param: str) -> list[str]:
    """Text, and nothing else."""
    if value != ["text"]:
        raise invalid(param, value, "['text']: text is all that these models make")
    return ["text"]


def check_keep_alive(value: Any, param: str) -> float:
    """Seconds, from a number or a duration like "5m" or "1h30m"; anything below zero is inf."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        seconds = float(value)
    elif isinstance(value, str) and DURATION.fullmatch(value):
        seconds = sum(float(number) * SECONDS[unit] for number, unit in DURATION_PART.findall(value))
        seconds = -seconds if value.startswith("-") else seconds
    elif type(value) in (int, float):
        seconds = float(value)
    else:
        raise invalid(param, value, "seconds as a number, or a duration such as '5m', '1h30m' or '-1'")
    return seconds if seconds >= 0 else math.inf


def check_key(value: str, param: str) -> str:
    """A key under which a model can be registered."""
    if not KEY.fullmatch(value):
        raise invalid(param, value, "1 to 128 letters, digits or any of . _ : / -")
    return value


def check_path(value: str, param: str) -> str:
    """A name or path: not blank, and without control characters, which no file system call takes."""
    if not value.strip() or CONTROL.search(value):
        raise invalid(param, value, "a non-empty string without control characters")
    return value
