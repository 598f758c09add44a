"""Running sequences: what the decode batch knows of each."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from mlxserver.engine.kv_cache.sight import StepRow
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.sequence import Logprobs, SampledToken, Sequence


@dataclass
class RunningSequence:
    """A sequence that decodes. `fed`: its tokens in the KV cache behind the prompt's first ones, from the last prompt
    token on. num_sampled: tokens sampled for it, read or not. prompt_logprobs: to be published with its first token.
    lookup: predicts its tokens; None if it drafts none. hit_rates: how often it is right, likewise. draft_rates: how
    often a draft model is; draft_streak: how many of its last tokens were. credit: what verifying steps that gain
    nothing may cost it, in plain steps.
    """

    sequence: Sequence
    cached_tokens: int
    started: float
    fed: list[int] = field(default_factory=list)
    num_sampled: int = 0
    is_fresh: bool = True  # its input is still the last prompt token, which is not published
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    lookup: PromptLookup | None = None
    hit_rates: HitRates | None = None
    draft_rates: HitRates | None = None
    draft_streak: int = 0
    credit: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of KV cache that it needs, the next one included."""
        return len(self.sequence.tokens) + len(self.fed) + 1

    @property
    def row(self) -> StepRow:
        """Its row of the next step."""
        offset = len(self.sequence.tokens) - 1 + len(self.fed)
        if not (images := self.sequence.images):
            return StepRow(offset)
        # A prompt may end in an image, and its last token is decoded.
        return StepRow(offset, images.shift, nullcontext() if self.num_sampled else images.showing(offset, offset + 1))

    @property
    def most_drafted(self) -> int:
        """Most tokens to draft: a verifying step samples one more."""
        return self.sequence.max_tokens - self.num_sampled - 1

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens in its KV cache, once one was fed."""
        return (*self.sequence.tokens[:-1], *self.fed)

    @property
    def num_known(self) -> int:
        """Number of its tokens that are known."""
        return len(self.sequence.tokens) - 1 + len(self.fed)

    def known_from(self, start: int) -> list[int]:
        """Its known tokens from this position on."""
        behind_prompt = start - len(self.sequence.tokens) + 1
        return self.fed[behind_prompt:] if behind_prompt >= 0 else [*self.tokens[start:]]

    @property
    def keys(self) -> tuple[int, ...]:
        """What its KV cache is stored under."""
        return self.sequence.keys(self.tokens)

    def publish(self, token: int, logprobs: Logprobs | None) -> SampledToken:
        """A sampled token, the first one with the log-probabilities of the prompt."""
        of_prompt, self.prompt_logprobs = self.prompt_logprobs, None
        return SampledToken(self.sequence.id, token, self.cached_tokens, logprobs, self.started, of_prompt)

    def resumed(self) -> Sequence:
        """The sequence that goes on from here after a preemption."""
        generated = len(self.fed) - 1  # the first that was fed is the prompt's last
        if generated < 1:
            return self.sequence
        return replace(
            self.sequence,
            tokens=self.tokens,
            max_tokens=self.sequence.max_tokens - generated,
            num_generated=self.sequence.num_generated + generated,
        )
