"""Error of a wrong setting, and how a wrong value is quoted."""

from __future__ import annotations

ABBREVIATED_LENGTH = 100


def abbreviate(value: object) -> str:
    """The value as an error message quotes it: one line, at most ABBREVIATED_LENGTH characters and an ellipsis."""
    text = repr(value)
    return text if len(text) <= ABBREVIATED_LENGTH else f"{text[:ABBREVIATED_LENGTH]}..."


class ConfigInvalid(Exception):
    """A setting has a wrong value. Names the setting, the value and what was expected."""

    def __init__(self, key: str, value: object, expected: str) -> None:
        super().__init__(f"{key}: {value!r} is not valid; expected {expected}.")


class ModelInvalid(ConfigInvalid):
    """A model's source can't be used. reason: names the source, and what was expected."""

    def __init__(self, key: str, reason: Exception) -> None:
        Exception.__init__(self, f"model {key}: {reason}")
