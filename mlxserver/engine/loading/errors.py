"""What can go wrong with a source of models, as far as callers of the engine meet it.

SourceInvalid        it can't be understood, does not exist, or has no model that can be used
├── HubUnavailable   the hub can't be reached, is busy, or broke off
│   └── SearchFailed it can't be searched
├── DiskFull         its files do not fit on the disk
└── TooLarge         it needs more memory than models may take
"""

from __future__ import annotations

from rich.filesize import decimal

from mlxserver.config.errors import abbreviate
from mlxserver.engine.errors import EngineError


class SourceInvalid(EngineError):
    """A model source that can't be understood or does not exist."""

    def __init__(self, source: str, expected: str) -> None:
        super().__init__(f"Model source {abbreviate(source)}: {expected}")
        self.expected = expected


class HubUnavailable(SourceInvalid):
    """The hub can't be reached, is busy, or broke off."""


class SearchFailed(HubUnavailable):
    """The hub can't be searched. reason: why."""

    def __init__(self, words: str, reason: str) -> None:
        EngineError.__init__(self, f"Search for {abbreviate(words)}: {reason}")
        self.expected = reason


class DiskFull(SourceInvalid):
    """The files of a model do not fit on the disk."""


class TooLarge(SourceInvalid):
    """A model needs more memory than all models may take."""

    def __init__(self, source: str, needed: int, budget: int) -> None:
        sizes = f"it needs {decimal(needed)} of memory, and models may take {decimal(budget)}"
        super().__init__(source, f"{sizes} (it can be downloaded with force)")
