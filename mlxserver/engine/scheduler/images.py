"""Images of prompts on the engine thread: their features, positions, and names in the prefix cache.

Rule 1: a tower runs only for images that a chunk needs: not for those of a cached prefix, nor for one seen recently.
Rule 2: equal keys mean equal features at equal positions, so that they stand for the image in the prefix cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.kv_cache.sight import Sight
from mlxserver.engine.loading.vision_model import Features, Tower
from mlxserver.engine.requests import PlacedImage

Positions = np.ndarray[Any, np.dtype[np.int32]]


class Eyes:
    """A model's tower and sight, and the features of the images that it saw last, in so many bytes.

    has_grid_positions: image tokens have the positions of rows and columns. sees_whole: all tokens of an image attend
    to each other.
    """

    def __init__(
        self,
        tower: Tower,
        sight: Sight,
        kept_bytes: int,
        *,
        has_grid_positions: bool = False,
        sees_whole: bool = False,
    ) -> None:
        self.sight = sight
        self.sees_whole = sees_whole
        self.has_grid_positions = has_grid_positions
        self._tower = tower
        self._most = kept_bytes
        self._kept: OrderedDict[int, Features] = OrderedDict()
        self._held = 0

    def find(self, placed: PlacedImage) -> Features | None:
        """The features of an image that was seen; None without."""
        if found := self._kept.get(placed.image.key):
            self._kept.move_to_end(placed.image.key)
        return found

    def encode(self, placed: PlacedImage) -> Features:
        """Compute the features of an image."""
        features = self._tower.encode(placed.image)
        self._kept[placed.image.key] = features
        self._held += features.nbytes
        while self._held > self._most:
            self._held -= self._kept.popitem(last=False)[1].nbytes
        return features


class ImagesOfPrompt:
    """PromptImages of a prompt of `length` tokens."""

    def __init__(self, eyes: Eyes, images: Sequence[PlacedImage], length: int) -> None:
        self._eyes = eyes
        self._images = images
        self._keys = {at: placed.image.key for placed in images for at in placed.positions}
        self._held: dict[int, Features] = {}  # by the index of the image
        self._positions = _grid_positions(images, length) if eyes.has_grid_positions else None
        self.shift = int(self._positions.max()) + 1 - length if self._positions is not None else 0

    def keys(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens, each image's with its key in place of its tokens."""
        keys = list(tokens)
        for at, key in self._keys.items():
            if at < len(keys):
                keys[at] = key
        return tuple(keys)

    def encode(self, start: int, end: int) -> bool:
        """Compute the features of one image that has a part in these tokens. False: they are all at hand."""
        for index in self._seen(start, end):
            if index in self._held:
                continue
            placed = self._images[index]
            known = self._eyes.find(placed)
            self._held[index] = known or self._eyes.encode(placed)
            if not known:
                return True
        return False

    def whole(self, start: int, end: int) -> int:
        """Where a chunk of these tokens should end, so that it has no part of an image that has to be seen at once."""
        for placed in self._images if self._eyes.sees_whole else ():
            if placed.positions[0] < end <= placed.positions[-1]:
                return placed.positions[0] if placed.positions[0] > start else placed.positions[-1] + 1
        return end

    def showing(self, start: int, end: int) -> AbstractContextManager[None]:
        """A forward pass of these tokens in the block sees the images."""
        while self.encode(start, end):
            pass
        seen = list(self._seen(start, end))
        at: list[int] = []
        features, added = [], []
        for index in seen:
            own = [n for n, place in enumerate(self._images[index].positions) if start <= place < end]
            at += [self._images[index].positions[n] - start for n in own]
            part = mx.array(own)
            features.append(self._held[index].embeddings[part])
            added.append([layer[part] for layer in self._held[index].added])
        # What ends here is in the KV cache from now on.
        self._held = {index: own for index, own in self._held.items() if self._images[index].positions[-1] >= end}
        return self._eyes.sight.showing(
            at=mx.array(at) if at else None,
            features=mx.concatenate(features) if features else None,
            added=[mx.concatenate(list(layers)) for layers in zip(*added, strict=True)],
            positions=self._positions_of(start, end),
            blocks=self._blocks_of(seen, start, end) if seen and self._eyes.sees_whole else None,
        )

    def _seen(self, start: int, end: int) -> Iterator[int]:
        """Indices of the images that have a part in these tokens."""
        for index, placed in enumerate(self._images):
            # Other tokens may stand between an image's own (pixtral).
            first = bisect_left(placed.positions, start)
            if first < len(placed.positions) and placed.positions[first] < end:
                yield index

    def _blocks_of(self, seen: Sequence[int], start: int, end: int) -> mx.array:
        blocks = np.full(end - start, -1, dtype=np.int32)
        for index in seen:
            places = np.array(self._images[index].positions) - start
            blocks[places[(places >= 0) & (places < end - start)]] = index
        return mx.array(blocks)

    def _positions_of(self, start: int, end: int) -> mx.array | None:
        if self._positions is None:
            return None
        own = self._positions[:, start:end]
        beyond = np.arange(max(start, self._positions.shape[1]), end, dtype=np.int32) + self.shift  # were generated
        return mx.array(np.concatenate([own, np.broadcast_to(beyond, (3, len(beyond)))], axis=1))


def _grid_positions(images: Sequence[PlacedImage], length: int) -> Positions:
    """Positions of a prompt's tokens, [3, length]: time, row and column.

    Those of text go on by one in all three. An image begins where the text before it ends, and the text behind it at
    the largest of its positions (arXiv:2409.12191, section 2.1).
    """
    positions = np.zeros((3, length), dtype=np.int32)
    done = at = 0
    for placed in images:
        start, count = placed.positions[0], len(placed.positions)
        rows, columns = placed.image.grid or (1, count)
        positions[:, done:start] = np.arange(at, at + start - done)
        at += start - done
        row, column = np.divmod(np.arange(count), columns)
        positions[:, start : start + count] = at + np.stack([np.zeros_like(row), row, column])
        done, at = start + count, at + max(rows, columns)
    positions[:, done:] = np.arange(at, at + length - done)
    return positions
