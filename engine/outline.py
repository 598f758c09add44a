"""What can be known of a model before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outline:
    """config: the model's config.json. stored_bytes: its weights as they are stored, without the files' headers."""

    config: Mapping[str, Any]
    stored_bytes: int
