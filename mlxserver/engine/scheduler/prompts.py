"""Prompts between their arrival and the decode batch."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from mlxserver.engine.events import PrefillProgress, QueuePosition
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.sequence import Logprobs, PromptImages, Sequence

_ANSWER_TOKENS = 64  # of KV cache that a prompt must find beside its own, lest it should join only to be preempted


@dataclass
class PendingPrompt:
    """A prompt that waits or is prefilled, and the sequences that share it. Times by time.monotonic().

    done: how many of its tokens are in `cache`, a list of mlx-lm's caches. cached_tokens: those from the prefix cache.
    stops: lengths, in order, at which a chunk ends, for a checkpoint to be taken (kv_cache/checkpoints.py). restoring:
    a prefix of it is being brought from disk. logprobs: of the tokens from the second on, as far as they are measured.
    """

    sequences: list[Sequence]
    arrived: float
    started: float = 0.0
    cache: Cache = field(default_factory=list)
    done: int = 0
    cached_tokens: int = 0
    stops: list[int] = field(default_factory=list)
    restoring: Future[None] | None = None
    logprobs: list[Logprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.report()

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens of the prompt."""
        return self.sequences[0].tokens

    @property
    def images(self) -> PromptImages | None:
        """The images that it has."""
        return self.sequences[0].images

    def keys(self, length: int | None = None) -> tuple[int, ...]:
        """What the KV cache of its first tokens, or of all, is stored under."""
        return self.sequences[0].keys(self.tokens[:length])

    def showing(self, count: int) -> AbstractContextManager[None]:
        """A forward pass of so many of its next tokens in the block sees its images."""
        return self.images.showing(self.done, self.done + count) if self.images else nullcontext()

    @property
    def is_restoring(self) -> bool:
        """Whether a prefix of it is still being brought from disk."""
        return self.restoring is not None and not self.restoring.done()

    @property
    def is_scored(self) -> bool:
        """Whether its log-probabilities are measured: then all of it is prefilled, whatever the prefix cache has."""
        return self.sequences[0].is_scored

    @property
    def remaining(self) -> int:
        """Number of tokens still to prefill; the last one is left for the first decode step."""
        return len(self.tokens) - 1 - self.done

    @property
    def ahead(self) -> int:
        """Number of tokens that may be prefilled at once: up to the next stop."""
        return self.stops[0] - self.done if self.stops else self.remaining

    @property
    def length(self) -> int:
        """Tokens of KV cache that it needs: its own, and those of the beginning of an answer."""
        return len(self.tokens) + min(_ANSWER_TOKENS, self.sequences[0].max_tokens)

    def report(self) -> None:
        """Report its progress: it waits, is prefilled, or is ready."""
        if (progress := self.sequences[0].progress) is None:
            return
        if not self.started:
            progress.move(QueuePosition())
        else:
            progress.move(PrefillProgress(self.done, len(self.tokens)) if self.remaining else None)

    def drop(self, sequence_ids: set[int]) -> bool:
        """Remove sequences; returns whether none is left."""
        self.sequences = [sequence for sequence in self.sequences if sequence.id not in sequence_ids]
        return not self.sequences

    def next(self, most: int) -> list[int]:
        """Its next tokens, so many at the most, but for an image that has to be seen at once."""
        return list(self.tokens[self.done : self.whole(self.done, self.done + min(self.ahead, most))])

    def whole(self, start: int, end: int) -> int:
        """Where a chunk that begins at `start` ends rather than at `end`, lest it has a part of an image."""
        # An image may end the prompt, and the last token is decoded.
        return min(self.images.whole(start, end), len(self.tokens) - 1) if self.images else end

    def following(self, count: int) -> list[int]:
        """The tokens behind each of its next ones."""
        return list(self.tokens[self.done + 1 : self.done + 1 + count])

    def reach_stop(self) -> bool:
        """Whether it is prefilled up to a stop, which is one no more."""
        if reached := self.stops[:1] == [self.done]:
            del self.stops[0]
        return reached
