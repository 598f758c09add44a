"""Constraints of a request's sequences: a grammar, a thinking budget, a minimum length.

Rule 1: a grammar of required calls takes precedence over one of JSON. Beside that, tools may be called; without it,
        strict tools have a grammar of their own.
Rule 2: compile() runs on the tokenizer worker, everything else on the engine thread. That must not encode with the
        tokenizer, whose modes the worker switches: the tags are encoded once, when the model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxserver.engine.conversation import Tool
from mlxserver.engine.output.channels import ChannelParser
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.reasoning_formats import THINK, find_format
from mlxserver.engine.output.splitter import Splitter
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.output.tool_calls import ToolCallParser, make_tool_parser
from mlxserver.engine.output.tool_formats import FORCED
from mlxserver.engine.prompt.formats import PromptFormat
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt, GenerationRequest, Grammar, JsonFormat, ToolChoice
from mlxserver.engine.sampling.channel_grammars import OPENING, answer_messages, forced_messages, strict_messages
from mlxserver.engine.sampling.constraints import Every, Restricted, ThinkingControl
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sampling.json_grammars import json_grammar
from mlxserver.engine.sampling.tool_grammars import calls_or_answer, forced_calls, strict_calls
from mlxserver.engine.sequence import Constraint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

MAX_OPENED = 16  # tokens of a prompt that may begin an answer


class RequestConstraints:
    """Makes the constraints, and the thinking parsers, of one model's requests."""

    def __init__(self, tokenizer: TokenizerWrapper, prompts: PromptFormat, grammars: Grammars, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._grammars = grammars
        self._vocab_size = vocab_size
        self.tool_format = prompts.tool_format
        self._marks = find_format(tokenizer) or THINK
        # With the line breaks that models set round it: a bare tag in mid-sentence would not stop a small model.
        end = self._marks.end if self._marks.is_everywhere else f"\n{self._marks.end}\n\n"
        self._has_messages = bool(self._marks.channels and self._marks.channels.call)
        texts = (self._marks.start, end, OPENING if self._has_messages else "", *self._marks.answers)
        encoded = [tuple(tokenizer.encode(text, add_special_tokens=False)) if text else () for text in texts]
        self._start, self._end, self._opening, *answers = encoded
        # A start tag of calls in the place of an answer's opening is in the grammar, unless both begin alike.
        first = {ids[0] for ids in answers[:1]}
        openings = zip(self._marks.answers, answers, strict=True)
        calls = [ids for text, ids in openings if text in self.tool_format.starts and ids[0] not in first]
        self._answers = [ids for ids in answers if ids not in calls] or [()]
        self._calls_open_answers = bool(calls)

    def compile(self, request: GenerationRequest) -> Grammar | None:
        """Make the grammar of a request, if it has one, and compile it. Raises PromptRejected."""
        grammar = self.grammar(request)
        if grammar:
            self._grammars.compile(grammar)
        return grammar

    def grammar(self, request: GenerationRequest) -> Grammar | None:
        """Grammar of a request's answers: of required calls, JSON, or calls within free text. Raises PromptRejected."""
        if request.formatted:
            return request.grammar
        if self._has_messages and isinstance(request.prompt, ChatPrompt):
            return self._messages(request, request.prompt.tools)
        tools = request.prompt.tools if isinstance(request.prompt, ChatPrompt) else ()
        if tools and request.tool_choice.mode in ("required", "function"):
            return forced_calls(tools, request.tool_choice, thinks=self._prompts.thinks)
        if request.format:
            return self._answer_grammar(request.format, tools, request.tool_choice)
        if request.tool_choice.mode == "none":
            return None
        return strict_calls(tools, self.tool_format, self._grammars)

    def _messages(self, request: GenerationRequest, tools: Sequence[Tool]) -> Grammar | None:
        """Grammar of answers that are messages with headers, calls among them."""
        form, choice = request.format, request.tool_choice
        if tools and choice.mode in ("required", "function"):
            return forced_messages(tools, choice, self._grammars)
        callable = tools if choice.mode == "auto" else ()
        if form:
            return answer_messages(callable, choice, self._grammars, schema=form.schema, param=form.origin)
        return strict_messages(callable, self._grammars)

    def _answer_grammar(self, form: JsonFormat, tools: Sequence[Tool], choice: ToolChoice) -> Grammar:
        """Grammar of an answer in JSON, or of calls in its place where tools may be called."""
        if not tools or choice.mode == "none":
            return json_grammar(form.schema, form.origin, thinks=self._prompts.thinks)
        return calls_or_answer(
            tools,
            choice,
            self.tool_format,
            self._grammars,
            schema=form.schema,
            param=form.origin,
            thinks=self._prompts.thinks,
        )

    def constraint(
        self, request: GenerationRequest, prompt: FormattedPrompt, grammar: Grammar | None
    ) -> Constraint | None:
        """Constraint of one sequence, the request's grammar included; None without any. Raises PromptRejected."""
        parts: list[Constraint] = []
        if request.min_tokens:
            parts.append(Restricted(self._tokenizer.eos_token_ids, request.min_tokens, self._vocab_size))
        parser, budget = self.parser(request, prompt), self._budget(request)
        is_whole = self._has_messages and isinstance(request.prompt, ChatPrompt)  # with the reasoning
        begun = self._begun(prompt.tokens) if is_whole else ()
        answer = self._grammars.constraint(grammar, begun) if grammar else None
        inner = None if is_whole else answer
        if parser and (inner or budget is not None):
            parts.append(self._thinking_control(request, parser, prompt, inner))
        if answer and (is_whole or not parser):
            parts.append(answer)
        return Every(parts) if len(parts) > 1 else parts[0] if parts else None

    def _begun(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What a prompt has begun of the answer's messages."""
        length = len(self._opening)
        starts = (at for at in range(len(prompt) - length, -1, -1) if prompt[at : at + length] == self._opening)
        return prompt[next(starts, len(prompt)) :]

    def tool_parser(self, request: GenerationRequest, index: int = 0) -> ToolCallParser | None:
        """Parser of the calls in one choice's content; None where none can come."""
        forced = self.tool_format if self._has_messages else FORCED
        return make_tool_parser(self.tool_format, request, index, forced=forced)

    def parser(self, request: GenerationRequest, prompt: FormattedPrompt, index: int = 0) -> Splitter | None:
        """Parser that splits one sequence's reasoning from its answer; None where no reasoning can come."""
        if not isinstance(request.prompt, ChatPrompt) or not (self._prompts.thinks or self._marks.is_everywhere):
            return None
        tools = _callable(request, self._has_messages)
        if channels := self._marks.channels:
            names = [tool.name for tool in tools]
            return ChannelParser(
                channels, prompt.opens_thinking, tools=names, parallel=request.tool_choice.parallel, index=index
            )
        return ThinkingParser(
            self._marks,
            prompt.opens_thinking,
            may_close_twice=self._budget(request) is not None,
            call_starts=self.tool_format.starts if tools else (),
            call_end=self.tool_format.end,
        )

    def _budget(self, request: GenerationRequest) -> int | None:
        """Most tokens of reasoning: the request's, unless reasoning is off, else what its effort stands for."""
        budget = self._prompts.budget(request.prompt)
        return budget if budget == 0 or request.thinking_budget is None else request.thinking_budget

    def _thinking_control(
        self, request: GenerationRequest, parser: Splitter, prompt: FormattedPrompt, answer: Constraint | None
    ) -> ThinkingControl:
        # What keeps a schema is an answer to the user, and no message of another kind.
        is_answer = answer and (self._marks.channels or request.format or request.tool_choice.mode != "auto")
        answers = self._answers[:1] if is_answer else self._answers
        if self._calls_open_answers and _callable(request, self._has_messages):
            answers = [*answers, ()]
        return ThinkingControl(
            parser,
            make_detokenizer(self._tokenizer).feed,
            start=self._start,
            end=self._end,
            answers=answers,
            opened=prompt.tokens[-MAX_OPENED:],
            vocab_size=self._vocab_size,
            budget=self._budget(request),
            inner=answer,
        )


def _callable(request: GenerationRequest, is_native: bool) -> tuple[Tool, ...]:
    """The tools that the model may call in its own format, in which forced calls come if that is_native."""
    is_called = request.tool_choice.mode in ("auto", *(("required", "function") if is_native else ()))
    return request.prompt.tools if is_called and isinstance(request.prompt, ChatPrompt) else ()
