"""A loaded model put together for one engine thread: batch, prompt formatter, output streams; warm-up; release."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from engine import loader
from engine.batcher import Batcher
from engine.config import ModelSpec
from engine.errors import ContextExceeded, PromptRejected
from engine.kv import PrefixCache
from engine.output import OutputStream
from engine.prompts import FORMATS, PromptFormat, find_type, thinking_tags
from engine.thinking import ThinkingParser
from engine.types import GenerationRequest, ModelFacts, Row, Sampling


@dataclass
class ModelRuntime:
    """A loaded model. Sizes in bytes, context in tokens."""

    batch: Batcher
    loaded: loader.LoadedModel
    prompts: PromptFormat
    facts: ModelFacts

    def prepare(self, request: GenerationRequest) -> tuple[tuple[int, ...], int, OutputStream]:
        """Prompt tokens, most tokens to generate, and the output stream of a request.

        Raises:
            PromptRejected: the model can't take these messages, or has not the tokens of logit_bias.
            ContextExceeded: they are longer than the context.
        """
        self._check_bias(request.sampling)
        prompt = self.prompts.format(request.prompt)
        room = self.facts.context_length - len(prompt.tokens)
        if room < 1:
            raise ContextExceeded(len(prompt.tokens), self.facts.context_length)
        max_tokens = min(request.max_tokens or room, room)
        tokenizer, thinking = self.loaded.tokenizer, None
        if self.facts.type == "thinking":
            thinking = ThinkingParser(*thinking_tags(tokenizer), starts_inside=prompt.opens_thinking)
        output = OutputStream(
            tokenizer, eos=tokenizer.eos_token_ids, max_tokens=max_tokens, stop=request.stop, thinking=thinking
        )
        return prompt.tokens, max_tokens, output

    def _check_bias(self, sampling: Sampling) -> None:
        """Refuse tokens that do not exist: MLX would write beyond the end of the logits."""
        last = self.batch.vocab_size - 1
        for token in sampling.logit_bias:
            if not 0 <= token <= last:
                raise PromptRejected(
                    f"logit_bias: this model has no token {token}; expected 0 to {last}.", "logit_bias"
                )


class Builder:
    """Builds the runtimes of one process. They know of each other's streams, and keep their chunks short for them."""

    def __init__(self, stall_target: float) -> None:
        self._stall_target = stall_target
        self._batches: list[weakref.ref[Batcher]] = []  # weak: an unloaded model's memory must go

    def build(self, spec: ModelSpec) -> ModelRuntime:
        """Load a model and warm it up, on the thread that will run it. Raises LoadFailed."""
        loaded = loader.load(spec)
        batch = Batcher(
            loaded.model,
            max_running=spec.max_running,
            stall_target=self._stall_target,
            prefix_cache=PrefixCache(spec.prefix_cache_bytes) if spec.prefix_cache_bytes else None,
            is_anybody_streaming=self._is_anybody_streaming,
        )
        model_type = spec.type or find_type(loaded.tokenizer)
        prompts = FORMATS[model_type](loaded.tokenizer, loaded.config)
        warm_up(batch)
        self._batches = [*(known for known in self._batches if known()), weakref.ref(batch)]
        facts = ModelFacts(model_type, loaded.context_length, loaded.weight_bytes)
        return ModelRuntime(batch, loaded, prompts, facts)

    def _is_anybody_streaming(self) -> bool:
        return any(batch.is_streaming() for known in self._batches if (batch := known()))


def warm_up(batch: Batcher) -> None:
    """Run the shapes and samplers that requests use, so that no request pays for a compilation."""
    filtered = Sampling(temperature=0.7, top_p=0.9)
    for width in (1, 2):
        rows = [Row(-1 - n, tuple(range(1, 34)), filtered if n else Sampling(temperature=0.0), 3) for n in range(width)]
        for row in rows:
            batch.insert(row)
        steps = 0
        while steps < 5:
            batch.decode()
            batch.prefill()
            steps += 1
        batch.remove([row.id for row in rows])
    batch.shrink_prefixes(0)


@contextmanager
def thread_stream() -> Iterator[None]:
    """A stream of the calling thread's own; released when the block ends."""
    stream = mx.new_thread_local_stream(mx.default_device())
    try:
        with mx.stream(stream):
            yield
    finally:
        mx.synchronize(stream)
        mx.clear_streams()


def free_memory() -> None:
    """Give what a dropped model held back to the system."""
    gc.collect()
    mx.clear_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
