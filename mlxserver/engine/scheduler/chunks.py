"""Chunks of prompts: which prompts may be in one, and what each strategy of processing them does.

Rule: a prompt's cache is a list of mlx-lm's caches throughout; values behind their offsets have no meaning.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any, Protocol

from mlxserver.engine.mlx import mx, nn

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading.metadata import attention_heads, model_arguments
from mlxserver.engine.platform.attention_memory import STATE_REACH, AttentionMemory
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.logprobs import measure_prompt, read_prompt
from mlxserver.engine.scheduler.prompts import PendingPrompt

SCORED = 128  # tokens of a chunk whose logits are needed: about as many values as sampling takes


@dataclass(frozen=True)
class Chunk:
    """Prompts that are processed together, and the most tokens of each."""

    prompts: abc.Sequence[PendingPrompt]
    length: int


@dataclass(frozen=True, slots=True)
class LaunchedChunk:
    """A chunk that the device computes, or has computed. tokens: their number, padding included. last: its last array,
    which is there when all of it is.
    """

    tokens: int
    last: Any


class PrefillStrategy(Protocol):
    """Chooses and runs chunks. yields_cores: peers' decode steps go on during a chunk, however long it is."""

    yields_cores: bool

    def choose(self, waiting: abc.Sequence[PendingPrompt], budget: int) -> Chunk:
        """The next chunk, of about `budget` tokens; the first of the waiting prompts is always in it."""

    def run(self, chunk: Chunk, beside_peers: bool = False) -> LaunchedChunk:
        """Process a chunk into its prompts' caches; where the policy has async_chunks, it is launched and no more.

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


def attention_memory(model: Any, policy: ExecutionPolicy) -> AttentionMemory:
    """Memory that the attention of a model's chunks takes."""
    heads = attention_heads(*model_arguments(model)) if isinstance(model, nn.Module) else 0
    reach = 0 if caches.has_attention(model) else STATE_REACH
    in_blocks = policy.materialized_attention and caches.attends_in_blocks(model)
    return AttentionMemory(heads, policy, reach, caches.dequantized_bytes(model), in_blocks)


def may_share(waiting: abc.Sequence[PendingPrompt]) -> abc.Sequence[PendingPrompt]:
    """Prompts that may share a chunk with the first one: none where images are to be seen."""
    return waiting[:1] if waiting[0].images else [prompt for prompt in waiting if not prompt.images]


def measure_chunk(prompt: PendingPrompt, logits: mx.array, length: int) -> list[mx.array]:
    """Log-probabilities of the tokens behind a chunk of so many of a prompt's, padding included."""
    tokens = prompt.following(length)
    return measure_prompt(logits[0], tokens + [0] * (length - len(tokens)), prompt.sequences[0].prompt_logprobs or 0)


def record_chunk(prompt: PendingPrompt, measured: abc.Sequence[mx.array], count: int) -> None:
    """Record the log-probabilities of a chunk that is processed."""
    prompt.logprobs += read_prompt(measured, count)
    prompt.done += count
