"""Prefill strategies: which prompts a chunk has, and in which shapes it goes through the model.

Rule: a prompt's cache is a list of mlx-lm's caches throughout; values behind their offsets have no meaning.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any, Protocol

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.kv_cache import attention_shapes, caches, ragged
from mlxserver.engine.kv_cache.slots import (
    Layers,
    StepPositions,
    empty_layers,
    fill,
    flat_arrays,
    grow,
    slot_capacity,
    slot_layers,
)
from mlxserver.engine.loading.metadata import attention_heads, model_arguments
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.attention_memory import STATE_REACH, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.requests import Execution
from mlxserver.engine.sampling.logprobs import measure_prompt, read_prompt
from mlxserver.engine.scheduler.prompts import PendingPrompt

# Tokens of a chunk where shapes have to recur. Fewer than 512 take little less time, but leave the GPU to other models.
_LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048)
_SHORT = 512  # longest prompts that share a chunk
_MOST_TOGETHER = 4  # prompts of a chunk: joining the decode batch delays a step, too
_SCORED = 128  # tokens of a chunk whose logits are needed: about as many values as sampling takes
_SLACK = 1.25  # most that a chunk may exceed its budget by, lest the end of a prompt be left over


@dataclass(frozen=True)
class Chunk:
    """Prompts that are processed together, and the most tokens of each."""

    prompts: abc.Sequence[PendingPrompt]
    length: int


class PrefillStrategy(Protocol):
    """Chooses and runs chunks. yields_cores: peers' decode steps go on during a chunk, however long it is."""

    yields_cores: bool

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """The next chunk, of about `budget` tokens; the first of the waiting prompts is always in it."""

    def run(self, chunk: Chunk, beside_peers: bool = False) -> int:
        """Process a chunk into its prompts' caches. Returns the number of tokens computed, padding included.

        beside_peers: other models stream meanwhile.
        """

    def score(self, prompt: PendingPrompt, budget: int, beside_peers: bool = False) -> None:
        """Process a chunk of one prompt, of `budget` tokens at the most, and record its log-probabilities."""

    def tokens_for(self, length: int) -> int:
        """Tokens of KV cache that a prompt of so many tokens takes while it is processed."""

    def bytes_beyond(self, length: int) -> int:
        """Memory that a prompt of so many tokens takes beside its KV cache and what is reserved for chunks."""

    def shapes(self, length: int) -> abc.Sequence[tuple[int, int, int]]:
        """Shapes of chunks, those of prompts of so many tokens: prompts, tokens of each, capacity of their slots."""

    def rehearse(self, prompts: int, tokens: int, capacity: int) -> None:
        """Compute a chunk of such a shape, and keep nothing of it."""


def make_prefill_strategy(model: Any, policy: ExecutionPolicy | None = None) -> PrefillStrategy:
    """The strategy for a model on this device."""
    policy = policy or current()
    is_bucketed = policy.bucket_prefill and caches.is_plain(model)
    return BucketedPrefill(model, policy) if is_bucketed else PlainPrefill(model, policy)


def execution(model: Any, policy: ExecutionPolicy) -> Execution:
    """The paths that serve a model under a policy."""
    cache = policy.batch_cache if policy.batch_cache != "slots" or caches.is_plain(model) else "merged"
    may_pad = policy.prompts == "padded" and not caches.keeps_state(model)
    return Execution(cache, may_pad, policy.compile_steps and cache == "slots")


class PlainPrefill:
    """Chunks of any shape, in mlx-lm's own caches.

    Where a layer keeps a state, no chunk has padding: some of mlx-lm's models let it change the state (nemotron_h,
    mamba, jamba, rwkv7 and others).
    """

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        policy = policy or current()
        self._model = model
        self._attention = _attention_memory(model, policy)
        self._rounds = policy.round_chunks
        self._pads_attention = policy.bucket_attention
        if self._pads_attention:
            ragged.bind()
        self._may_share = policy.prompts != "alone"
        self._may_pad = policy.prompts == "padded" and not caches.keeps_state(model)
        self.yields_cores = policy.parallel_models

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """As many prompts as the budget holds, each padded to the longest; a little more if that ends them.

        Without padding, only prompts that have as many tokens for the chunk as the first one. No chunk goes beyond a
        prompt's next stop.
        """
        if self._rounds:
            budget = 1 << (budget.bit_length() - 1)
        most = self._attention.fit(int(_SLACK * budget), max(prompt.done for prompt in waiting))
        prompts: list[PendingPrompt] = []
        length = 0
        for prompt in _together(waiting) if self._may_share else waiting[:1]:
            own = prompt.ahead if prompt.ahead <= most else min(budget, most)
            if not self._may_pad and prompts and own != length:
                continue
            longest = max(length, own)
            if prompts and longest * (len(prompts) + 1) > most:
                break
            prompts.append(prompt)
            length = longest
        return Chunk(prompts, length)

    def run(self, chunk: Chunk, beside_peers: bool = False) -> int:
        """Process the chunk."""
        with cpu_attention.layer_by_layer(beside_peers), attention_shapes.padded(self._pads_attention):
            return self._run_together(chunk) if len(chunk.prompts) > 1 else self._run_alone(chunk)

    def _run_alone(self, chunk: Chunk) -> int:
        prompt = chunk.prompts[0]  # in place: a long prompt's cache must not be copied per chunk
        tokens = prompt.next(chunk.length)
        with prompt.showing(len(tokens)):
            self._model(mx.array([tokens]), cache=prompt.cache)
        mx.eval([layer.state for layer in prompt.cache])
        prompt.done += len(tokens)
        return len(tokens)

    def score(self, prompt: PendingPrompt, budget: int, beside_peers: bool = False) -> None:
        """Process the next tokens of the prompt."""
        tokens = prompt.next(self._attention.fit(min(budget, _SCORED), prompt.done))
        with (
            cpu_attention.layer_by_layer(beside_peers),
            attention_shapes.padded(self._pads_attention),
            prompt.showing(len(tokens)),
        ):
            logits = self._model(mx.array([tokens]), cache=prompt.cache)
            measured = _measure(prompt, logits, len(tokens))
            mx.eval([layer.state for layer in prompt.cache], measured)
        _record(prompt, measured, len(tokens))

    def tokens_for(self, length: int) -> int:
        """The prompt's own tokens."""
        return length

    def bytes_beyond(self, length: int) -> int:
        """Attention scores at the end of a long prompt."""
        return self._attention.bytes_beyond(length)

    def shapes(self, length: int) -> abc.Sequence[tuple[int, int, int]]:
        """None: any shape will do."""
        return ()

    def rehearse(self, prompts: int, tokens: int, capacity: int) -> None:
        """Nothing to do."""

    def _run_together(self, chunk: Chunk) -> int:
        """One forward pass for several prompts, the shorter ones padded on the right."""
        cache = caches.merge([prompt.cache for prompt in chunk.prompts])
        tokens = [prompt.next(chunk.length) for prompt in chunk.prompts]
        lengths = [len(part) for part in tokens]
        longest = max(lengths)
        if min(lengths) < longest:
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
        self._model(mx.array([part + [0] * (longest - len(part)) for part in tokens]), cache=cache)
        for layer in cache:
            layer.finalize()
        mx.eval([layer.state for layer in cache])
        for index, (prompt, length) in enumerate(zip(chunk.prompts, lengths, strict=True)):
            prompt.done += length
            prompt.cache = caches.extract(cache, index, prompt.done)
        return longest * len(lengths)


class BucketedPrefill:
    """Chunks of few shapes, padded on the right, in slots of few capacities (kv_cache/slots.py).

    Prompts with images have chunks of any shape: they are few, and where their images stand differs.
    """

    yields_cores = False

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        self._model = model
        self._seeing = PlainPrefill(model, policy)
        self._empty = empty_layers(model)
        policy = policy or current()
        self._attention = _attention_memory(model, policy)
        is_compiled = policy.compile_steps
        self._forward = mx.compile(self._advance) if is_compiled else self._advance
        self._scoring_forward = mx.compile(self._advance_scored) if is_compiled else self._advance_scored

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """Short prompts together, as many as the budget holds, a power of two; or one long prompt."""
        first = waiting[0]
        if first.images:
            return self._seeing.choose(waiting, budget)
        waiting = _together(waiting)
        most = max(_LENGTHS[0], budget)
        allowed = [length for length in _LENGTHS if length <= most]
        length = next((length for length in allowed if length >= first.remaining), allowed[-1])
        capacity = self._capacity(first, length)
        alike = [p for p in waiting if p.remaining <= length and self._capacity(p, length) == capacity]
        if length > _SHORT or first.remaining > length:
            alike = [first]
        together = max(1, min(len(alike), most // length, _MOST_TOGETHER))
        return Chunk(alike[: 1 << (together.bit_length() - 1)], length)

    def run(self, chunk: Chunk, beside_peers: bool = False) -> int:
        """Process the chunk."""
        if chunk.prompts[0].images:
            return self._seeing.run(chunk, beside_peers)
        keys, values = self._forward(*self._inputs(chunk))
        mx.eval(keys, values)
        for slot, prompt in enumerate(chunk.prompts):
            prompt.done += len(prompt.next(chunk.length))
            _give_back(prompt, keys, values, slot)
        return len(chunk.prompts) * chunk.length

    def score(self, prompt: PendingPrompt, budget: int, beside_peers: bool = False) -> None:
        """Process the next tokens of the prompt, in one shape."""
        if prompt.images:
            self._seeing.score(prompt, budget, beside_peers)
            return
        count = len(prompt.next(_SCORED))
        keys, values, logits = self._scoring_forward(*self._inputs(Chunk([prompt], _SCORED)))
        measured = _measure(prompt, logits, _SCORED)
        mx.eval(keys, values, measured)
        _record(prompt, measured, count)
        _give_back(prompt, keys, values, 0)

    def tokens_for(self, length: int) -> int:
        """Capacity of a slot for its tokens, wherever its chunks begin, and for the padding of the last one."""
        # Less than half of a long chunk is padding, or else a shorter one would do.
        return slot_capacity(length + min(max(_SHORT, length), _LENGTHS[-1] // 2), _SHORT)

    def bytes_beyond(self, length: int) -> int:
        """Dequantised keys and values of a long prompt. A GPU does not write the scores out."""
        return self._attention.bytes_beyond(self.tokens_for(length))

    def shapes(self, length: int) -> abc.Sequence[tuple[int, int, int]]:
        """Short prompts alone and together; of a long one, its first chunks and what may be left at its end."""
        together = [1 << power for power in range(_MOST_TOGETHER.bit_length())]
        capacity = slot_capacity(length, _SHORT)
        lengths = sorted((own for own in _LENGTHS if own <= capacity), reverse=length > _SHORT)
        return [(count, own, capacity) for own in lengths for count in (together if capacity <= _SHORT else [1])]

    def rehearse(self, prompts: int, tokens: int, capacity: int) -> None:
        """Compute a chunk of such a shape, at the end of its slots."""
        slots = ([grow(array, prompts, capacity) for array in arrays] for arrays in self._empty)
        offsets = mx.full((prompts,), capacity - tokens, dtype=mx.int32)
        mx.eval(self._forward(mx.zeros((prompts, tokens), dtype=mx.uint32), offsets, *slots))

    def _advance(self, tokens: mx.array, offsets: mx.array, keys: Layers, values: Layers) -> tuple[Layers, Layers]:
        """Forward pass of tokens, [slots, tokens]. Returns the keys and values with them written, per layer."""
        keys, values, _ = self._advance_scored(tokens, offsets, keys, values)
        return keys, values

    def _advance_scored(
        self, tokens: mx.array, offsets: mx.array, keys: Layers, values: Layers
    ) -> tuple[Layers, Layers, mx.array]:
        """As _advance(), with the logits, [slots, tokens, vocab]."""
        slots, _, capacity, _ = keys[0].shape
        step = StepPositions(offsets, slots, capacity)
        cache = slot_layers(keys, values, step)
        logits = self._model(tokens, cache=cache)
        return *flat_arrays(cache), logits

    def _inputs(self, chunk: Chunk) -> tuple[mx.array, mx.array, Layers, Layers]:
        """The chunk's tokens, padded, their offsets, and the prompts' slots."""
        capacity = max(self._capacity(prompt, chunk.length) for prompt in chunk.prompts)
        tokens = [prompt.next(chunk.length) for prompt in chunk.prompts]
        padded = mx.array([part + [0] * (chunk.length - len(part)) for part in tokens], dtype=mx.uint32)
        offsets = mx.array([prompt.done for prompt in chunk.prompts], dtype=mx.int32)
        return padded, offsets, *self._take_slots(chunk.prompts, capacity)

    def _take_slots(self, prompts: abc.Sequence[PendingPrompt], capacity: int) -> tuple[Layers, Layers]:
        """The prompts' KV caches in slots of one capacity. The prompts lose them: MLX writes a chunk in place only if
        no other reference is left, and would copy the arrays otherwise.
        """
        taken: list[tuple[Layers, Layers]] = []
        for prompt in prompts:
            taken.append(flat_arrays(prompt.cache) if prompt.done else self._empty)
            for layer in prompt.cache:
                layer.keys = layer.values = None
        keys, values = (_side_by_side([own[part] for own in taken], capacity) for part in (0, 1))
        return keys, values

    def _capacity(self, prompt: PendingPrompt, length: int) -> int:
        """Capacity of the slot that a prompt needs for a chunk of so many tokens."""
        return slot_capacity(max(len(prompt.tokens), prompt.done + length), _SHORT)


def _attention_memory(model: Any, policy: ExecutionPolicy) -> AttentionMemory:
    heads = attention_heads(*model_arguments(model)) if isinstance(model, nn.Module) else 0
    reach = 0 if caches.has_attention(model) else STATE_REACH
    in_blocks = policy.materialized_attention and caches.attends_in_blocks(model)
    return AttentionMemory(heads, policy, reach, caches.dequantized_bytes(model), in_blocks)


def _together(waiting: abc.Sequence[PendingPrompt]) -> abc.Sequence[PendingPrompt]:
    """Prompts that may share a chunk with the first one: none where images are to be seen."""
    return waiting[:1] if waiting[0].images else [prompt for prompt in waiting if not prompt.images]


def _give_back(prompt: PendingPrompt, keys: Layers, values: Layers, slot: int) -> None:
    """Give a prompt the KV cache of its slot."""
    own_keys, own_values = ([array[slot : slot + 1] for array in arrays] for arrays in (keys, values))
    fill(prompt.cache, own_keys, own_values, prompt.done)


def _measure(prompt: PendingPrompt, logits: mx.array, length: int) -> list[mx.array]:
    """Log-probabilities of the tokens behind a chunk of so many of a prompt's, padding included."""
    tokens = prompt.following(length)
    return measure_prompt(logits[0], tokens + [0] * (length - len(tokens)), prompt.sequences[0].prompt_logprobs or 0)


def _record(prompt: PendingPrompt, measured: abc.Sequence[mx.array], count: int) -> None:
    """Record the log-probabilities of a chunk that is processed."""
    prompt.logprobs += read_prompt(measured, count)
    prompt.done += count


def _side_by_side(prompts: abc.Sequence[Layers], capacity: int) -> Layers:
    """Layers of several prompts, each [1 or none, heads, tokens, dim], in slots of one capacity."""
    layers = zip(*prompts, strict=True)
    return [mx.concatenate([grow(array, 1, capacity)[:, :, :capacity] for array in layer]) for layer in layers]
