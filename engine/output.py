"""One choice's token ids -> its events: detokenizer -> thinking split -> stop strings.

Rule 1: a stage sees only what the one before let pass, and no stage knows another.
Rule 2: stop strings are looked for in the content, as the client sees it. Reasoning is not searched: a stop at the
        first blank line ends an answer, not the thinking before it.
Rule 3: there is exactly one Finish. Everything held back comes out before it, but never a stop string, what follows
        one, or the text of an end-of-sequence token.
Rule 4: what feed() returns is text of the tokens fed so far, the last piece of it completed by this token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from engine.detokenizer import make_detokenizer
from engine.matching import StopStrings
from engine.thinking import ThinkingParser
from engine.types import Delta, Finish, FinishReason

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class OutputStream:
    """Reads the tokens of one choice.

    completion_tokens counts every token fed, an end of sequence included. reasoning_tokens counts those up to the
    end of the reasoning, tags included.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        eos: Collection[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        thinking: ThinkingParser | None = None,
        index: int = 0,
    ) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.is_finished = False
        self._detokenizer = make_detokenizer(tokenizer)
        self._eos = frozenset(eos)
        self._max_tokens = max_tokens
        self._stops = StopStrings(stop)
        self._thinking = thinking
        self._index = index

    def feed(self, token: int) -> list[Delta | Finish]:
        """The events that `token` brings; its Finish is the last of all.

        Raises ValueError when the choice has finished.
        """
        if self.is_finished:
            raise ValueError(f"token {token} after the end of choice {self._index}; expected none")
        self.completion_tokens += 1
        if token in self._eos:
            return self._finish("stop")
        events = self._pass_on(self._split(self._detokenizer.feed(token)))
        if not self.is_finished and self.completion_tokens >= self._max_tokens:
            events += self._finish("length")
        return events

    def _finish(self, reason: FinishReason) -> list[Delta | Finish]:
        deltas = self._split(self._detokenizer.flush())
        if self._thinking:
            deltas += self._thinking.flush()
        events = self._pass_on(deltas)
        if self.is_finished:  # the text that was held back held a stop string
            return events
        self.is_finished = True
        return [*events, *self._content(self._stops.flush()), Finish(reason, self._index)]

    def _split(self, text: str) -> list[Delta]:
        if self._thinking is None:
            return [Delta(text)] if text else []
        was_thinking = self._thinking.is_thinking
        deltas = self._thinking.feed(text)
        if was_thinking or self._thinking.is_thinking:
            self.reasoning_tokens = self.completion_tokens
        return deltas

    def _pass_on(self, deltas: Iterable[Delta]) -> list[Delta | Finish]:
        """Send deltas up to the first stop string, which ends the choice."""
        events: list[Delta | Finish] = []
        for delta in deltas:
            if delta.channel == "reasoning":
                events.append(Delta(delta.text, delta.channel, self._index))
                continue
            text, is_stopped = self._stops.feed(delta.text)
            events += self._content(text)
            if is_stopped:
                self.is_finished = True
                return [*events, Finish("stop", self._index)]
        return events

    def _content(self, text: str) -> list[Delta]:
        return [Delta(text, "content", self._index)] if text else []
