"""Names of models in Ollama's API: a tag follows the key, and `latest` is the one that need not be written."""

from __future__ import annotations

LATEST = ":latest"


def key_of(name: str) -> str:
    """The key or alias that a name stands for."""
    return name.removesuffix(LATEST) or name


def name_of(key: str) -> str:
    """The name under which a key is listed; key_of() gives the key back."""
    return key if ":" in key and not key.endswith(LATEST) else key + LATEST
