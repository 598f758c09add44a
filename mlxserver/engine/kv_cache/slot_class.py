"""Slots of one capacity class: arrays [slots, heads, capacity, dim].

Rule: sequences keep their slots, and those that join take free ones. They close up where slots are given back, and
      where only the first slots are computed: a move waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache.slots import Layers, grow

SlotArrays = tuple[Layers, Layers]  # keys and values of one sequence, arrays [1, heads, tokens, dim]
Put = Callable[[mx.array, Layers, Layers, Sequence[Layers], Sequence[Layers]], SlotArrays]


class SlotClass:
    """Keys and values of sequences, and which sequence of the batch has each slot (`holders`).

    holders: up to the last sequence; None has a slot that is free. offsets: [slots], tokens in each. shares_work:
    sequences are put into their slots together, in few numbers, which saves a GPU work. leaves_gaps: slots between
    those of sequences may be free.
    """

    def __init__(self, empty: SlotArrays, put: Put, *, shares_work: bool, leaves_gaps: bool) -> None:
        self.keys, self.values = list(empty[0]), list(empty[1])
        self.holders: list[int | None] = []
        self.offsets = mx.zeros((0,), dtype=mx.int32)
        self._put, self._shares_work, self._leaves_gaps = put, shares_work, leaves_gaps

    @property
    def members(self) -> list[int]:
        """The sequences, in the order of their slots."""
        return [holder for holder in self.holders if holder is not None]

    @property
    def slots(self) -> int:
        """Number of slots, used or not."""
        return int(self.keys[0].shape[0])

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for."""
        return int(self.keys[0].shape[2])

    def longest(self, lengths: Sequence[int]) -> int:
        """Tokens of its longest sequence. lengths: of all sequences of the batch."""
        return max(lengths[member] for member in self.members)

    def slots_for(self, count: int) -> int:
        """Slots to have for so many sequences: the next power of two, without shrinking for a few."""
        needed, present = slots_for(count), self.slots
        return present if needed <= present < 4 * needed else needed

    def grow(self, slots: int, capacity: int) -> None:
        """Have at least so many slots of at least so much capacity."""
        self.keys = [grow(keys, slots, capacity) for keys in self.keys]
        self.values = [grow(values, slots, capacity) for values in self.values]

    def add(self, members: Sequence[int], arrays: Sequence[SlotArrays]) -> None:
        """Put sequences into free slots; grow() beforehand, set_offsets() afterwards."""
        joining = iter(members)
        for group in self._groups(arrays):
            while group:
                slot, count = self._free_run(len(group))
                at = mx.array([slot], dtype=mx.int32)
                self.keys, self.values = self._put(at, self.keys, self.values, *zip(*group[:count], strict=True))
                self.holders += [None] * (slot + count - len(self.holders))
                self.holders[slot : slot + count] = islice(joining, count)
                group = group[count:]

    def _free_run(self, most: int) -> tuple[int, int]:
        """First of neighbouring free slots, and their number: `most`, a power of two, or else half as many."""
        free = 0
        for slot, holder in enumerate(self.holders):
            free = free + 1 if holder is None else 0
            if free == most:
                return slot + 1 - most, most
        end = len(self.holders)
        return (end, most) if end + most <= self.slots else self._free_run(most // 2)

    def _groups(self, arrays: Sequence[SlotArrays]) -> Iterator[list[SlotArrays]]:
        for _, alike in groupby(arrays, lambda own: own[0][0].shape[2]):
            group = list(alike)
            while group:
                count = 1 << (len(group).bit_length() - 1) if self._shares_work else 1
                yield group[:count]
                group = group[count:]

    def keep(self, members: dict[int, int]) -> None:
        """Keep only the slots of these members, and give these their new index."""
        self.holders = [None if holder is None else members.get(holder) for holder in self.holders]
        while self.holders and self.holders[-1] is None:
            self.holders.pop()
        count = len(self.members)
        gives_back = count > 0 and self.slots_for(count) < self.slots
        if gives_back or not self._leaves_gaps:
            self._close_up()
        if gives_back:
            slots = self.slots_for(count)
            self.keys = [mx.contiguous(keys[:slots]) for keys in self.keys]
            self.values = [mx.contiguous(values[:slots]) for values in self.values]

    def _close_up(self) -> None:
        """Have the last sequences fill the gaps."""
        count = len(self.members)
        last = iter([slot for slot in range(count, len(self.holders)) if self.holders[slot] is not None])
        moves = [(slot, next(last)) for slot in range(count) if self.holders[slot] is None]
        for slot, former in moves:
            self.holders[slot] = self.holders[former]
        del self.holders[count:]
        self._move(moves)

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move sequences to other slots: (to, from) pairs."""
        if not moves:
            return
        taken = mx.array([former for _, former in moves], dtype=mx.uint32)
        keys, values = [array[taken] for array in self.keys], [array[taken] for array in self.values]
        mx.eval(keys, values)  # or else an array that is written to would also be read from, and be copied whole
        for moved, (slot, _) in enumerate(moves):
            for array, copies in zip((*self.keys, *self.values), (*keys, *values), strict=True):
                array[slot] = copies[moved]

    def copy(self, member: int, length: int | None = None) -> SlotArrays:
        """A copy of a sequence's keys and values: its first `length` tokens, or its whole slot."""
        slot = self.holders.index(member)
        return (
            [mx.contiguous(keys[slot : slot + 1, :, :length]) for keys in self.keys],
            [mx.contiguous(values[slot : slot + 1, :, :length]) for values in self.values],
        )

    def set_offsets(self, lengths: Sequence[int]) -> None:
        """Set the offsets from the tokens of all sequences of the batch."""
        own = [0 if holder is None else lengths[holder] for holder in self.holders]
        self.offsets = mx.array(own + [0] * (self.slots - len(own)), dtype=mx.int32)

    def erase_unwritten(self) -> None:
        """Set what lies behind the tokens of each slot to zeros."""
        is_written = (mx.arange(self.capacity) < self.offsets[:, None])[:, None, :, None]
        for arrays in (self.keys, self.values):
            arrays[:] = [mx.where(is_written, array, mx.zeros((), dtype=array.dtype)) for array in arrays]

    def compact(self, capacity: int) -> None:
        """Give back slots that are not used, and capacity beyond this one."""
        slots, capacity = min(slots_for(len(self.members)), self.slots), min(capacity, self.capacity)
        if (slots, capacity) == (self.slots, self.capacity):
            return
        if slots < len(self.holders):
            self._close_up()
        for arrays in (self.keys, self.values):
            for n in range(len(arrays)):  # one by one, so that only one exists twice
                arrays[n] = mx.contiguous(arrays[n][:slots, :, :capacity])
                mx.eval(arrays[n])


def slots_for(count: int) -> int:
    """Least number of slots for so many sequences: a power of two."""
    return 1 << (count - 1).bit_length() if count else 0


def put(
    at: mx.array, keys: Layers, values: Layers, own_keys: Sequence[Layers], own_values: Sequence[Layers]
) -> SlotArrays:
    """Keys and values with those of sequences, arrays [1, heads, tokens, dim], in the slots from `at` [1] on."""
    return (
        [_put_array(array, mx.concatenate(own), at) for array, *own in zip(keys, *own_keys, strict=True)],
        [_put_array(array, mx.concatenate(own), at) for array, *own in zip(values, *own_values, strict=True)],
    )


def _put_array(array: mx.array, own: mx.array, at: mx.array) -> mx.array:
    """The array with the sequences in their slots, and zeros behind their tokens.

    Values there get a weight of 0, and 0 times the inf or NaN that an overflow left would be NaN.
    """
    if own.shape[2] < array.shape[2]:
        zeros = mx.broadcast_to(mx.zeros((), dtype=array.dtype), (own.shape[0], *array.shape[1:]))
        array = mx.slice_update(array, zeros, at, [0])
    return mx.slice_update(array, own, at, [0])
