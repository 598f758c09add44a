"""Output stream of one choice: token ids -> events, by detokenizer, splitter, stop strings and tool calls.

Rule 1: a stage gets only what the stage before it lets pass, and no stage knows another.
Rule 2: stop strings are searched for in the content, as the client sees it. Reasoning is not searched: a stop at the
        first blank line ends an answer, not the thinking before it.
Rule 3: there is exactly one Finish. Text that was held back is emitted before it, but never a stop string, what follows
        one, or the text of an end-of-sequence token.
Rule 4: feed() returns text of the tokens fed so far, the last piece of it completed by this token.
Rule 5: a token's log-probabilities go with the first of its text that is emitted (output/marked_text.py). Those of
        tokens without any, of tags, stop strings, tool calls and ends of sequence, are dropped.
Rule 6: a character that max_tokens cuts in two is left out; one that the model itself leaves incomplete is U+FFFD.
Rule 7: what looked like a call in the reasoning at its end, and is none, is reasoning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from mlxserver.engine.events import Channel, Delta, Finish, FinishReason, TokenLogprob, ToolCallDelta
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.marked_text import TokenText
from mlxserver.engine.output.splitter import Piece, Splitter
from mlxserver.engine.output.stop_strings import StopStrings
from mlxserver.engine.output.tool_calls import ToolCallParser

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

OutputEvent = Delta | ToolCallDelta | Finish


class OutputStream:
    """Parser of the tokens of one choice.

    eos: the tokens that end it; with ignore_eos they have no text and end nothing. max_tokens: 0 ends it with the first
    token, which is no part of it. thinking: splits reasoning from content, and calls where the model writes them as
    messages; None where all is content. tools: None where none may be called in the content. repeats_unclosed: an
    answer that is all reasoning, and that the model itself ended without closing it, is given as content, too.
    completion_tokens counts every token of it, an end of sequence included; reasoning_tokens those of the reasoning,
    marks included.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        eos: Collection[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        thinking: Splitter | None = None,
        tools: ToolCallParser | None = None,
        ignore_eos: bool = False,
        repeats_unclosed: bool = False,
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
        self._is_plain = not (thinking or tools or any(stop))  # no stage but the first holds text back
        self._index = index
        self._incomplete: list[TokenLogprob] = []  # of tokens whose text is still to come
        self._counted = 0  # completion tokens of which it is known whether they are reasoning
        self._has_calls = False  # from the splitter
        self._has_answer = False  # besides reasoning; known where that may be repeated
        self._reasoning: list[str] | None = [] if repeats_unclosed and thinking else None

    def feed(self, token: int, logprobs: TokenLogprob | None = None) -> list[OutputEvent]:
        """The events that `token` completes; the Finish is the last of all.

        Raises ValueError after the end of the choice.
        """
        if self.is_finished:
            raise ValueError(f"token {token} after the end of choice {self._index}; expected none")
        if not self._max_tokens:
            return self._finish("length")
        self.completion_tokens += 1
        events = self._read(token, logprobs)
        return events if self._reasoning is None else self._repeat_unclosed(events)

    def _read(self, token: int, logprobs: TokenLogprob | None) -> list[OutputEvent]:
        if token in self._eos and not self._ignore_eos:
            return self._finish("stop")
        events: list[OutputEvent] = []
        if token not in self._eos:
            if logprobs:
                self._incomplete.append(logprobs)
            events = self._emit(self._detokenizer.feed(token))
        if not self.is_finished and self.completion_tokens >= self._max_tokens:
            events += self._finish("length")
        return events

    def _emit(self, text: str) -> list[OutputEvent]:
        """The events of text that a token completes."""
        if self._is_plain and not self._incomplete:
            return [Delta(text, "content", self._index)] if text else []
        return self._pass_on(self._split(text))

    def _finish(self, reason: FinishReason) -> list[OutputEvent]:
        """The events of what the stages hold back, each passed through those behind it, and the Finish."""
        rest = self._detokenizer.flush()
        whole = rest.rstrip("\ufffd") if reason == "length" else rest
        pieces = self._split(whole)
        holds_call = self._thinking is not None and self._thinking.holds_call
        if self._thinking:
            pieces += self._thinking.flush()
        events = self._conclude(pieces, reason, is_cut=whole != rest)
        if holds_call and not any(isinstance(event, ToolCallDelta) for event in events):
            self._count_reasoning()
            texts = [piece[1] for piece in pieces if isinstance(piece, tuple)]
            return [*(self._delta(text, "reasoning") for text in texts), Finish(reason, self._index)]
        return events

    def _conclude(self, pieces: Iterable[Piece], reason: FinishReason, *, is_cut: bool) -> list[OutputEvent]:
        """The events of the last pieces and the Finish. is_cut: inside a character."""
        events = self._pass_on(pieces)
        if not self.is_finished:
            events += self._read_content(self._stops.flush())
        if not self.is_finished:  # what was held back may have ended the choice
            events += self._cut_character() if is_cut else []
            events += self._end(reason, is_cut=reason == "length")
        return events

    def _repeat_unclosed(self, events: list[OutputEvent]) -> list[OutputEvent]:
        """The events, and before the Finish all of the reasoning as content if the answer has nothing else."""
        assert self._reasoning is not None
        for event in events:
            match event:
                case Delta(text, "reasoning"):
                    self._reasoning.append(text)
                case Delta() | ToolCallDelta():
                    self._has_answer = True
                case Finish("stop") if self._thinking and self._thinking.is_unclosed and not self._has_answer:
                    whole = "".join(self._reasoning)
                    return [*events[:-1], *([self._delta(TokenText(whole))] if whole else []), event]
        return events

    def _cut_character(self) -> list[OutputEvent]:
        """The log-probabilities of the tokens of a character that was cut: their bytes are known."""
        if self._tools or not self._incomplete:
            return []
        channel: Channel = "reasoning" if self._thinking and self._thinking.is_thinking else "content"
        return [self._delta(TokenText("", tuple((0, token) for token in self._incomplete)), channel)]

    def _split(self, text: str) -> list[Piece]:
        """Text that a token completes, by channel; it may be a call."""
        marked = TokenText(text)
        if text and self._incomplete:
            marked = TokenText(text, tuple((0, token) for token in self._incomplete))
            self._incomplete.clear()
        if self._thinking is None:
            return [("content", marked)] if text else []
        was_thinking = self._thinking.is_thinking
        pieces = self._thinking.feed(marked)
        if (was_thinking or self._thinking.is_thinking) and not self._thinking.holds_call:
            self._count_reasoning()
        elif pieces:
            self._counted = self.completion_tokens
        return pieces

    def _count_reasoning(self) -> None:
        """Count the tokens since the last that were counted, as reasoning or not."""
        self.reasoning_tokens += self.completion_tokens - self._counted
        self._counted = self.completion_tokens

    def _pass_on(self, pieces: Iterable[Piece]) -> list[OutputEvent]:
        """The events of pieces up to the first stop string, or the last tool call, which ends the choice."""
        events: list[OutputEvent] = []
        for piece in pieces:
            if isinstance(piece, ToolCallDelta):
                self._has_calls = True
                events += [*self._read_content(self._stops.flush()), piece]
                continue
            channel, text = piece
            if channel == "reasoning":
                events.append(self._delta(text, channel))
                continue
            text, is_stopped = self._stops.feed(text)
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
        if reason == "stop" and (self._has_calls or (self._tools and self._tools.completed)):
            reason = "tool_calls"
        return [*events, Finish(reason, self._index, self._stops.matched)]

    def _to_events(self, pieces: Iterable[TokenText | ToolCallDelta]) -> list[OutputEvent]:
        return [self._delta(piece) if isinstance(piece, TokenText) else piece for piece in pieces]

    def _delta(self, text: TokenText, channel: Channel = "content") -> Delta:
        return Delta(text.text, channel, self._index, text.logprobs)
