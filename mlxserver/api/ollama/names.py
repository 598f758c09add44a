"""Names of models in Ollama's API: a tag follows the key, and `latest` is the one that need not be written."""

from __future__ import annotations

LATEST = ":latest"


def key_of(name: str) -> str:
    """The key that a name stands for."""
    return name.removesuffix(LATEST) or name


def names_of(name: str) -> tuple[str, ...]:
    """The names that a model may be registered under: the key, and the name as it was given."""
    return tuple(dict.fromkeys((key_of(name), name)))


def name_of(key: str) -> str:
    """The name under which a key is listed; names_of() has the key."""
    return key if ":" in key else key + LATEST
