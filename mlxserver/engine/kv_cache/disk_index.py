"""Names of the prefix cache's files, and which of them a prompt can use. Nothing is read.

A file's name has its kind, the tokens that it is of, and a hash of the model and of all tokens up to its end.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mlxserver.engine.kv_cache.cache_files import SUFFIX
from mlxserver.engine.kv_cache.prefix_cache import Tokens

# Kinds of files: blocks of layers that are all there are, blocks beside checkpoints, and checkpoints of either kind.
WHOLE, BESIDE, ALONE, STATE = "w", "b", "c", "s"


class FileName(NamedTuple):
    """Name of a file: tokens from `start` up to `end`."""

    kind: str
    start: int
    end: int
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.start}-{self.end}-{self.digest}{SUFFIX}"

    @staticmethod
    def parse(text: str) -> FileName | None:
        """The name that a text is."""
        parts = text.removesuffix(SUFFIX).split("-")
        if not text.endswith(SUFFIX) or len(parts) != 4 or not (parts[1].isdigit() and parts[2].isdigit()):
            return None
        return FileName(parts[0], int(parts[1]), int(parts[2]), parts[3])


@dataclass(frozen=True)
class Plan:
    """Files of a prefix of `length` tokens: blocks in order, and a checkpoint."""

    length: int
    blocks: tuple[FileName, ...] = ()
    checkpoint: FileName | None = None

    @property
    def names(self) -> list[FileName]:
        """All files, the most important first."""
        return [*self.blocks, *([self.checkpoint] if self.checkpoint else [])]


class Digests:
    """Hashes of a model and the beginnings of tokens, computed from the one before."""

    def __init__(self, model: str, tokens: Tokens) -> None:
        self._tokens = tokens
        self._hash = hashlib.sha256(model.encode())
        self._done = 0

    def at(self, end: int) -> str:
        """The hash of the first `end` tokens, no fewer than before."""
        self._hash.update(self._tokens[self._done : end].tobytes())
        self._done = end
        return self._hash.hexdigest()[:32]

    def ahead(self, end: int) -> str:
        """As at(), without advancing."""
        ahead = self._hash.copy()
        ahead.update(self._tokens[self._done : end].tobytes())
        return ahead.hexdigest()[:32]


@dataclass
class FileIndex:
    """Files of a model, as its folder had them at `changed`, by st_mtime_ns. model: the folder's name.

    listed: when the folder was listed, by time.monotonic(). is_noted: files of this process were added since, and those
    that other processes added meanwhile are not known.
    """

    model: str
    changed: int = 0
    listed: float = 0.0
    is_noted: bool = False
    _names: set[FileName] = field(default_factory=set)
    _ends: dict[tuple[str, int], set[int]] = field(default_factory=lambda: defaultdict(set))

    def add(self, names: Iterable[str]) -> None:
        """Add the files among these names."""
        for name in filter(None, map(FileName.parse, names)):
            self._names.add(name)
            self._ends[name.kind, name.start].add(name.end)

    def noted(self, names: Sequence[FileName], changed: int) -> FileIndex:
        """The index with files that were written since, for others may be searching this one."""
        index = FileIndex(self.model, changed, self.listed, is_noted=True, _names={*self._names, *names})
        index._ends.update(self._ends)
        for name in names:
            place = name.kind, name.start
            index._ends[place] = {*index._ends.get(place, ()), name.end}
        return index

    def find(self, tokens: Tokens) -> Plan:
        """The files of the longest prefix of these tokens, one of which at least is left to compute."""
        most = len(tokens) - 1
        if whole := self._blocks(tokens, most, WHOLE):
            return Plan(whole[-1].end, whole)
        if not (found := self.checkpoints(tokens, most)):
            return Plan(0)
        blocks = self._blocks(tokens, len(tokens), BESIDE)
        covered = blocks[-1].end if blocks else 0
        for name in reversed(found):
            if name.kind == ALONE:
                return Plan(name.end, checkpoint=name)
            if name.end <= covered:
                return Plan(name.end, tuple(block for block in blocks if block.start < name.end), name)
        return Plan(0)

    def checkpoints(self, tokens: Tokens, most: int) -> list[FileName]:
        """The checkpoints of beginnings of these tokens, of `most` tokens at most, the shortest first."""
        digests, found = Digests(self.model, tokens), list[FileName]()
        ends = {end for kind in (ALONE, STATE) for end in self._ends.get((kind, 0), ())}
        for end in sorted(end for end in ends if end <= most):
            digest = digests.at(end)
            names = (FileName(kind, 0, end, digest) for kind in (ALONE, STATE))
            found += [name for name in names if name in self._names]
        return found

    def _blocks(self, tokens: Tokens, most: int, kind: str) -> tuple[FileName, ...]:
        """Blocks of the beginning of these tokens, one behind the other, the longest ones."""
        digests, blocks, start = Digests(self.model, tokens), list[FileName](), 0
        while name := self._next_block(digests, kind, start, most):
            blocks.append(name)
            start = name.end
            digests.at(start)
        return tuple(blocks)

    def _next_block(self, digests: Digests, kind: str, start: int, most: int) -> FileName | None:
        ends = [end for end in self._ends.get((kind, start), ()) if start < end <= most]
        names = (FileName(kind, start, end, digests.ahead(end)) for end in sorted(ends, reverse=True))
        return next((name for name in names if name in self._names), None)
