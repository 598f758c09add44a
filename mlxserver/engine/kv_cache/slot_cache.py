"""Slots in capacity classes: KV cache of the sequences of a model with plain keys and values.

Rule 1: every sequence has a slot in the class of its own length, so that a step writes one token per sequence and
        copies nothing, shapes change seldom, and no sequence pays for a much longer one. A compiled step needs that.
Rule 2: a sequence that outgrows its class moves to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches, slot_drafts
from mlxserver.engine.kv_cache.class_passes import ClassPasses
from mlxserver.engine.kv_cache.classes import (
    ClassOf,
    capacity_for,
    coarse_capacity_for,
    grouped,
    narrow_class,
    wide_classes,
)
from mlxserver.engine.kv_cache.ragged import can_be_ragged
from mlxserver.engine.kv_cache.rows import Rows
from mlxserver.engine.kv_cache.slot_class import SlotArrays, SlotClass, put, slots_for
from mlxserver.engine.kv_cache.slots import (
    Layers,
    StepPositions,
    empty_layers,
    fill,
    flat_arrays,
    grow,
    slot_layers,
)
from mlxserver.engine.platform import cpu_matmul
from mlxserver.engine.platform.policy import ExecutionPolicy, current


class SlotCache:
    """Slots of plain keys and values, in capacity classes.

    Where a model can have ragged keys (kv_cache/ragged.py), a step is one forward pass with many narrow classes; else
    one per class, of few, wide ones. wide: None chooses them by the sizes of the model.
    """

    def __init__(
        self,
        model: Any,
        policy: ExecutionPolicy | None = None,
        narrow: ClassOf = narrow_class,
        wide: ClassOf | None = None,
    ) -> None:
        policy = policy or current()
        self._model = model
        self._is_padded = policy.pad_slots
        self._is_compiled = policy.compile_steps
        self._step = mx.compile(self._forward) if self._is_compiled else self._forward
        self._put = mx.compile(put) if self._is_compiled else put
        self._empty = empty_layers(model)
        self._is_ragged = can_be_ragged(model, self._empty)
        self._passes = ClassPasses(model, self._is_ragged, policy.decode_kernel, policy.fuse_layers)
        self._class_of = narrow if self._is_ragged else wide or wide_classes(caches.pass_tokens(model))
        self.clear()

    def clear(self) -> None:
        """Drop all sequences. Compiled functions stay."""
        self._classes: dict[int, SlotClass] = {}
        self._lengths: list[int] = []
        self._set_rows()

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences behind the present ones; slots are made for those that come, too, as if they were alike."""
        first = len(self._lengths)
        self._lengths += [cache[0].offset for cache in joining]
        groups = grouped(range(first, len(self._lengths)), self._class_for)
        num_classes = len({*self._classes, *groups})
        for name, members in groups.items():
            slot_class = self._grown(name, members, num_classes, coming)
            slot_class.add(members, [self._own(joining[member - first], slot_class.capacity) for member in members])
            coming = 0
        self._set_rows()

    def _own(self, cache: caches.Cache, capacity: int) -> SlotArrays:
        """Keys and values of a sequence, of one token at least, and no longer than a slot."""
        if not (length := cache[0].offset):
            keys, values = ([grow(array, 1, 1) for array in arrays] for arrays in self._empty)
            return keys, values
        end = capacity if self._is_compiled else length
        keys, values = flat_arrays(cache)
        return [array[:, :, :end] for array in keys], [array[:, :, :end] for array in values]

    def _class_for(self, member: int, tokens: int = 1) -> int:
        """The class of a sequence, with its next tokens."""
        return self._class_of(self._lengths[member] + tokens)

    def _grown(
        self, name: int, members: Sequence[int], num_classes: int, coming: int = 0, tokens: int = 1
    ) -> SlotClass:
        """A class with slots for more members, with so many next tokens, and for so many members that come.

        num_classes: of all there will be.
        """
        if name not in self._classes:
            made = SlotClass(self._empty, self._put, shares_work=self._is_compiled, leaves_gaps=self._is_padded)
            self._classes = dict(sorted({**self._classes, name: made}.items()))
        slot_class = self._classes[name]
        count = len(slot_class.members) + len(members) + coming
        longest = max(self._lengths[member] for member in members) + tokens
        slot_class.grow(slot_class.slots_for(count), self._capacity_for(longest, num_classes))
        return slot_class

    def _capacity_for(self, tokens: int, num_classes: int) -> int:
        """Capacity of the slots of one of so many classes, whose longest sequence has so many tokens."""
        is_coarse = self._is_compiled and self._is_ragged and num_classes > 1
        return coarse_capacity_for(tokens) if is_coarse else capacity_for(tokens)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._lengths = [self._lengths[index] for index in order]
        index = {former: new for new, former in enumerate(order)}
        self._keep(dict.fromkeys(self._classes, index))

    def _keep(self, members: dict[int, dict[int, int]]) -> None:
        """Keep, in each class, only these members, under their new indices."""
        for name, kept in members.items():
            self._classes[name].keep(kept)
        self._classes = {name: slot_class for name, slot_class in self._classes.items() if slot_class.members}
        self._set_rows()

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's keys and values."""
        slot_class = next(slot_class for slot_class in self._classes.values() if index in slot_class.members)
        cache, length = caches.new_cache(self._model), self._lengths[index]
        fill(cache, *slot_class.copy(index, length), length)
        return cache

    def advance(self, inputs: mx.array, sights: Sequence[mx.array] = ()) -> mx.array:
        """Compute one token per sequence."""
        return self._compute_step(self._with_room(), inputs, sights, 1)

    @property
    def class_of(self) -> ClassOf:
        """The class of a sequence of so many tokens."""
        return self._class_of

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sequence."""
        return self._lengths

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Slots and capacity of each class: a step is compiled once for each shape and number of tokens."""
        return tuple((own.slots, own.capacity) for own in self._classes.values())

    def make_room(self, tokens: int) -> None:
        """Let so many tokens of each sequence fit: those that outgrow their class move."""
        self._with_room(tokens)

    def fits(self, tokens: int) -> bool:
        """Whether so many tokens of each sequence can be written without a slot that grows or moves."""
        for name, slot_class in self._classes.items():
            longest = slot_class.longest(self._lengths) + tokens
            if longest > slot_class.capacity or self._class_of(longest) > name:
                return False
        return True

    def verify(self, tokens: mx.array) -> mx.array:
        """Compute several tokens of each sequence at once, [batch, n] -> logits [batch, n, vocab]; fits(n) beforehand,
        rewind() afterwards. NaN or inf at one position may reach earlier ones of its sequence.
        """
        return self._compute_step(list(self._classes.values()), tokens, (), tokens.shape[1])

    def draft(self, inputs: mx.array, count: int, predict: slot_drafts.Predict) -> mx.array:
        """The next tokens of each sequence as a head of the model predicts them, [batch, count]; fits(count + 1)
        beforehand. inputs: [batch], not computed yet. The sequences stay as they are. Nothing is evaluated.
        """
        classes = list(self._classes.values())
        keys = [own.keys for own in classes]
        steps = [[*self._positions([own.offsets + n for own in classes], keys, count)] for n in range(count)]
        drafted = slot_drafts.draft(self._rows.arrange(inputs), classes, steps, predict, is_ragged=self._is_ragged)
        return self._rows.restore(drafted)

    def rewind(self, counts: Sequence[int], *, erases: bool = False) -> None:
        """Take so many tokens of each sequence back. erases: what they have written may be NaN or inf."""
        self._lengths = [length - count for length, count in zip(self._lengths, counts, strict=True)]
        for slot_class in self._classes.values():
            slot_class.set_offsets(self._lengths)
            if erases:
                slot_class.erase_unwritten()

    def _compute_step(
        self, classes: Sequence[SlotClass], inputs: mx.array, sights: Sequence[mx.array], tokens: int
    ) -> mx.array:
        """Logits of a step with so many tokens per sequence, [batch] or [batch, tokens], which has room for them."""
        logits, offsets, keys, values = self._step(
            self._rows.arrange(inputs),
            [self._rows.arrange(own) for own in sights],
            [slot_class.offsets for slot_class in classes],
            [slot_class.keys for slot_class in classes],
            [slot_class.values for slot_class in classes],
        )
        for n, slot_class in enumerate(classes):
            slot_class.offsets, slot_class.keys, slot_class.values = offsets[n], keys[n], values[n]
        self._lengths = [length + tokens for length in self._lengths]
        return self._rows.restore(logits)

    def _with_room(self, tokens: int = 1) -> list[SlotClass]:
        """The classes, each with room for the next tokens of its members: those that outgrew theirs have moved."""
        for name in [*reversed(self._classes)]:  # the next class first
            if self._class_of(self._classes[name].longest(self._lengths) + tokens) > name:
                self._move(name, tokens)
        for slot_class in self._classes.values():
            capacity = self._capacity_for(slot_class.longest(self._lengths) + tokens, len(self._classes))
            if capacity > slot_class.capacity:
                slot_class.grow(0, capacity)
        return list(self._classes.values())

    def _move(self, name: int, tokens: int) -> None:
        """Move the members that outgrew a class with their next tokens."""
        by_class = grouped(self._classes[name].members, lambda member: self._class_for(member, tokens))
        staying = by_class.pop(name, [])
        num_classes = len({*self._classes, *by_class}) - (not staying)
        for other, members in by_class.items():
            arrays = [self._classes[name].copy(member) for member in members]
            mx.eval(arrays)  # or else an array that is written to would also be read from, and be copied whole
            self._grown(other, members, num_classes, tokens=tokens).add(members, arrays)
        self._keep({name: {member: member for member in staying}})

    def tokens_for(self, lengths: Sequence[int]) -> int:
        """Tokens that the slots of such sequences hold."""
        groups = grouped(lengths, self._class_of)
        return sum(self._class_tokens(name, own, len(groups)) for name, own in groups.items())

    def _class_tokens(self, name: int, lengths: Sequence[int], num_classes: int) -> int:
        capacity = self._capacity_for(max(lengths), num_classes)
        if not (present := self._classes.get(name)):
            return slots_for(len(lengths)) * capacity
        return max(present.slots_for(len(lengths)), present.slots) * max(present.capacity, capacity)

    def tokens_alone(self, length: int) -> int:
        """Tokens that one slot for such a sequence holds."""
        return capacity_for(length)

    @property
    def held_tokens(self) -> int:
        """Tokens that the present slots hold, used or not."""
        return sum(slot_class.slots * slot_class.capacity for slot_class in self._classes.values())

    def compact(self) -> None:
        """Give back slots and capacity that the present sequences do not need."""
        for slot_class in self._classes.values():
            slot_class.compact(self._capacity_for(slot_class.longest(self._lengths) + 1, len(self._classes)))
        self._set_rows()

    def _forward(
        self,
        inputs: mx.array,
        sights: list[mx.array],
        offsets: list[mx.array],
        keys: list[Layers],
        values: list[Layers],
    ) -> tuple[mx.array, list[mx.array], list[Layers], list[Layers]]:
        """Forward pass of the rows of all classes, [rows] or [rows, tokens]. Lists but the sights are per class.

        The logits are those of each row, [rows, vocab], or of each token, [rows, tokens, vocab].
        """
        tokens = inputs.shape[1] if inputs.ndim > 1 else 1
        classes = [
            slot_layers(own_keys, own_values, step)
            for own_keys, own_values, step in zip(keys, values, self._positions(offsets, keys, tokens), strict=True)
        ]
        if inputs.ndim > 1:
            logits = self._passes.logits(inputs, sights, classes)
        else:
            logits = self._passes.logits(inputs[:, None], sights, classes)[:, -1, :]
        written_keys, written_values = zip(*map(flat_arrays, classes), strict=True)
        return logits, [offset + tokens for offset in offsets], list(written_keys), list(written_values)

    def _positions(self, offsets: list[mx.array], keys: list[Layers], tokens: int) -> Iterable[StepPositions]:
        # A CPU's time grows with every slot computed and token attended to; a GPU is better off with shapes that recur.
        if self._is_padded:
            for offset, own_keys in zip(offsets, keys, strict=True):
                yield StepPositions(offset, offset.shape[0], own_keys[0].shape[2])
            return
        for offset, slot_class in zip(offsets, self._classes.values(), strict=True):
            longest = slot_class.longest(self._lengths) + tokens
            visible = min(cpu_matmul.whole_pieces(longest), slot_class.capacity)
            yield StepPositions(offset, len(slot_class.members), visible)

    def _set_rows(self) -> None:
        """Set the classes' offsets, and the rows: those of each class, with its unused slots if they are computed."""
        rows: list[int | None] = []
        for slot_class in self._classes.values():
            slot_class.set_offsets(self._lengths)
            unused = slot_class.slots - len(slot_class.holders) if self._is_padded else 0
            rows += [*slot_class.holders, *[None] * unused]
        self._rows = Rows(rows)
