"""Prefill in chunks of any shape, in mlx-lm's own caches."""

from __future__ import annotations

from collections import abc
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import attention_shapes, caches, ragged
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.scheduler.chunks import (
    SCORED,
    Chunk,
    LaunchedChunk,
    attention_memory,
    may_share,
    measure_chunk,
    record_chunk,
)
from mlxserver.engine.scheduler.prompts import PendingPrompt

_SLACK = 1.25  # most that a chunk may exceed its budget by, lest the end of a prompt be left over


class PlainPrefill:
    """Chunks of any shape, in mlx-lm's own caches.

    Where a layer keeps a state, no chunk has padding: some of mlx-lm's models let it change the state (nemotron_h,
    mamba, jamba, rwkv7 and others).
    """

    def __init__(self, model: Any, policy: ExecutionPolicy | None = None) -> None:
        policy = policy or current()
        self._model = model
        self._attention = attention_memory(model, policy)
        self._evaluate: Any = mx.async_eval if policy.async_chunks else mx.eval
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
        for prompt in may_share(waiting) if self._may_share else waiting[:1]:
            own = prompt.ahead if prompt.ahead <= most else min(budget, most)
            if not self._may_pad and prompts and own != length:
                continue
            longest = max(length, own)
            if prompts and longest * (len(prompts) + 1) > most:
                break
            prompts.append(prompt)
            length = longest
        return Chunk(prompts, length)

    def run(self, chunk: Chunk, beside_peers: bool = False) -> LaunchedChunk:
        """Process the chunk."""
        with cpu_attention.layer_by_layer(beside_peers), attention_shapes.padded(self._pads_attention):
            return self._run_together(chunk) if len(chunk.prompts) > 1 else self._run_alone(chunk)

    def _run_alone(self, chunk: Chunk) -> LaunchedChunk:
        prompt = chunk.prompts[0]  # in place: a long prompt's cache must not be copied per chunk
        tokens = prompt.next(chunk.length)
        with prompt.showing(len(tokens)):
            self._model(mx.array([tokens]), cache=prompt.cache)
        self._evaluate([layer.state for layer in prompt.cache])
        prompt.done += len(tokens)
        return LaunchedChunk(len(tokens), prompt.cache[-1].state)

    def score(self, prompt: PendingPrompt, budget: int, beside_peers: bool = False) -> None:
        """Process the next tokens of the prompt."""
        tokens = prompt.next(self._attention.fit(min(budget, SCORED), prompt.done))
        with (
            cpu_attention.layer_by_layer(beside_peers),
            attention_shapes.padded(self._pads_attention),
            prompt.showing(len(tokens)),
        ):
            logits = self._model(mx.array([tokens]), cache=prompt.cache)
            measured = measure_chunk(prompt, logits, len(tokens))
            mx.eval([layer.state for layer in prompt.cache], measured)
        record_chunk(prompt, measured, len(tokens))

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

    def _run_together(self, chunk: Chunk) -> LaunchedChunk:
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
        self._evaluate([layer.state for layer in cache])
        for index, (prompt, length) in enumerate(zip(chunk.prompts, lengths, strict=True)):
            prompt.done += length
            prompt.cache = caches.extract(cache, index, prompt.done)
        return LaunchedChunk(longest * len(lengths), cache[-1].state)
