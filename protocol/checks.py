"""Checks of parameters that have a structure or a syntax of their own.

Rule: a check takes (value, param), returns the value that handlers see, and raises ValidationFailed.
"""

from __future__ import annotations

import re
from typing import Any

from protocol.parameters import ValidationFailed, invalid, shown

KEY = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
TOKEN_ID = re.compile(r"[0-9]{1,9}")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MAX_STOPS = 16


def check_stop(value: Any, param: str) -> tuple[str, ...]:
    """Stop strings, from one string or a list of them."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise invalid(param, value, f"a string or a list of up to {MAX_STOPS} strings")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not stop:
            raise invalid(param if stops is not value else f"{param}[{index}]", stop, "a non-empty string")
    return tuple(stops)


def check_logit_bias(value: Any, param: str) -> dict[int, float]:
    """Token ids and the addend to their logits."""
    if not isinstance(value, dict):
        raise invalid(param, value, "an object of token ids and numbers")
    for token, bias in value.items():
        if not TOKEN_ID.fullmatch(token):
            raise invalid(param, token, "token ids (decimal digits) as its keys")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise invalid(f"{param}.{token}", bias, "a number at least -100 and at most 100")
    return {int(token): float(bias) for token, bias in value.items()}


def check_stream_options(value: Any, param: str) -> dict[str, bool]:
    """The one option of streams: include_usage."""
    if not isinstance(value, dict):
        raise invalid(param, value, '{"include_usage": true or false}')
    for name, option in value.items():
        if name != "include_usage":
            raise ValidationFailed(f"Unknown option {shown(name)} in '{param}'.", f"{param}.{name[:64]}")
        if option is not None and not isinstance(option, bool):
            raise invalid(f"{param}.{name}", option, "true or false")
    return {name: option for name, option in value.items() if option is not None}


def check_key(value: str, param: str) -> str:
    """A key under which a model can be registered."""
    if not KEY.fullmatch(value):
        raise invalid(param, value, "1 to 128 letters, digits or any of . _ : / -")
    return value


def check_place(value: str, param: str) -> str:
    """A name or path: something, and without control characters, which no file system call takes."""
    if not value.strip() or CONTROL.search(value):
        raise invalid(param, value, "a non-empty string without control characters")
    return value
