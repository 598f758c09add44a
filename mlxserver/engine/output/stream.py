"""Output stream of one choice: token ids -> events, by detokenizer, thinking parser, stop strings and tool calls.

Rule 1: a stage gets only what the stage before it lets pass, and no stage knows another.
Rule 2: stop strings are searched for in the content, as the client sees it. Reasoning is not searched: a stop at the
        first blank line ends an answer, not the thinking before it.
Rule 3: there is exactly one Finish. Text that was held back is emitted before it, but never a stop string, what follows
        one, or the text of an end-of-sequence token.
Rule 4: feed() returns text of the tokens fed so far, the last piece of it completed by this token.
Rule 5: a token's log-probabilities go with the first of its text that is emitted (output/marked_text.py). Those of
        tokens without any, of tags, stop strings, tool calls and ends of sequence, are dropped.
Rule 6: a character that max_tokens cuts in two is left out; one that the model itself leaves incomplete is U+FFFD.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from mlxserver.engine.events import Channel, Delta, Finish, FinishReason, TokenLogprob, ToolCallDelta
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.stop_strings import StopStrings
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.output.tool_calls import ToolCallParser

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

OutputEvent = Delta | ToolCallDelta | Finish


class OutputStream:
    """Parser of the tokens of one choice.

    eos: the tokens that end it; with ignore_eos they have no text and end nothing. tools: None where none may be
    called. completion_tokens counts every token fed, an end of sequence included; reasoning_tokens those up to the end
    of the reasoning, tags included.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        eos: Collection[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        thinking: ThinkingParser | None = None,
        tools: ToolCallParser | None = None,
        ignore_eos: bool = False,
        index: int = 0,
    ) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.is_finished = False
        self._detokenizer = make_detokenizer(tokenizer)
        self._eos = frozenset(eos)
        self._ignore_eos = ignore_eos
        self._max_tokens = max_tokens
        self._stops = StopStrings(stop)
        self._thinking = thinking
        self._tools = tools
        self._index = index
        self._incomplete: list[TokenLogprob] = []  # of tokens whose text is still to come

    def feed(self, token: int, logprobs: TokenLogprob | None = None) -> list[OutputEvent]:
        """The events that `token` completes; the Finish is the last of all.

        Raises ValueError after the end of the choice.
        """
        if self.is_finished:
            raise ValueError(f"token {token} after the end of choice {self._index}; expected none")
        self.completion_tokens += 1
        if token in self._eos and not self._ignore_eos:
            return self._finish("stop")
        events: list[OutputEvent] = []
        if token not in self._eos:
            if logprobs:
                self._incomplete.append(logprobs)
            events += self._pass_on(self._split(self._detokenizer.feed(token)))
        if not self.is_finished and self.completion_tokens >= self._max_tokens:
            events += self._finish("length")
        return events

    def _finish(self, reason: FinishReason) -> list[OutputEvent]:
        """The events of what the stages hold back, each passed through those behind it, and the Finish."""
        rest = self._detokenizer.flush()
        whole = rest.rstrip("\ufffd") if reason == "length" else rest
        pieces = self._split(whole)
        if self._thinking:
            pieces += self._thinking.flush()
        events = self._pass_on(pieces)
        if not self.is_finished:
            events += self._read_content(self._stops.flush())
        if not self.is_finished:  # what was held back may have ended the choice
            events += self._cut_character() if whole != rest else []
            events += self._end(reason, is_cut=reason == "length")
        return events

    def _cut_character(self) -> list[OutputEvent]:
        """The log-probabilities of the tokens of a character that was cut: their bytes are known."""
        if self._tools or not self._incomplete:
            return []
        channel: Channel = "reasoning" if self._thinking and self._thinking.is_thinking else "content"
        return [self._delta(TokenText("", tuple((0, token) for token in self._incomplete)), channel)]

    def _split(self, text: str) -> list[tuple[Channel, TokenText]]:
        """Text that a token completes, by channel."""
        marked = TokenText(text)
        if text and self._incomplete:
            marked = TokenText(text, tuple((0, token) for token in self._incomplete))
            self._incomplete.clear()
        if self._thinking is None:
            return [("content", marked)] if text else []
        was_thinking = self._thinking.is_thinking
        pieces = self._thinking.feed(marked)
        if was_thinking or self._thinking.is_thinking:
            self.reasoning_tokens = self.completion_tokens
        return pieces

    def _pass_on(self, pieces: Iterable[tuple[Channel, TokenText]]) -> list[OutputEvent]:
        """The events of pieces up to the first stop string, or the last tool call, which ends the choice."""
        events: list[OutputEvent] = []
        for channel, piece in pieces:
            if channel == "reasoning":
                events.append(self._delta(piece, channel))
                continue
            text, is_stopped = self._stops.feed(piece)
            events += self._read_content(text)
            if is_stopped and not self.is_finished:
                events += self._end("stop", is_cut=True)
            if self.is_finished:
                break
        return events

    def _read_content(self, text: TokenText) -> list[OutputEvent]:
        """The events of content: its text and the tool calls in it."""
        if not self._tools:
            return [self._delta(text)] if text else []
        events = self._to_events(self._tools.feed(text))
        return [*events, *self._end("stop", is_cut=False)] if self._tools.is_done else events

    def _end(self, reason: FinishReason, *, is_cut: bool) -> list[OutputEvent]:
        self.is_finished = True
        events = self._to_events(self._tools.flush(is_cut=is_cut)) if self._tools else []
        if reason == "stop" and self._tools and self._tools.completed:
            reason = "tool_calls"
        return [*events, Finish(reason, self._index)]

    def _to_events(self, pieces: Iterable[TokenText | ToolCallDelta]) -> list[OutputEvent]:
        return [self._delta(piece) if isinstance(piece, TokenText) else piece for piece in pieces]

    def _delta(self, text: TokenText, channel: Channel = "content") -> Delta:
        return Delta(text.text, channel, self._index, text.logprobs)
