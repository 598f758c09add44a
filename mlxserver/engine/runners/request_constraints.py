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
from mlxserver.engine.prompt.formats import PromptFormat
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt, GenerationRequest, Grammar, JsonFormat, ToolChoice
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
        texts = (self._marks.start, end, self._marks.call, *self._marks.answers)
        encoded = [tuple(tokenizer.encode(text, add_special_tokens=False)) if text else () for text in texts]
        self._start, self._end, self._call, *answers = encoded
        self._answers = answers or [()]

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
        tools = request.prompt.tools if isinstance(request.prompt, ChatPrompt) else ()
        if tools and request.tool_choice.mode in ("required", "function"):
            return forced_calls(tools, request.tool_choice, thinks=self._prompts.thinks)
        if request.format:
            return self._answer_grammar(request.format, tools, request.tool_choice)
        if request.tool_choice.mode == "none":
            return None
        return strict_calls(tools, self.tool_format, self._grammars)

    def _answer_grammar(self, form: JsonFormat, tools: Sequence[Tool], choice: ToolChoice) -> Grammar:
        """Grammar of an answer in JSON, or of calls in its place where tools may be called."""
        if not tools or choice.mode == "none" or self._call:  # a call in its own channel is ThinkingControl's
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
        answer = self._grammars.constraint(grammar) if grammar else None
        parser, budget = self.parser(request, prompt), self._budget(request)
        if parser and (answer or budget is not None):
            parts.append(self._thinking_control(request, parser, prompt, answer))
        elif answer:
            parts.append(answer)
        return Every(parts) if len(parts) > 1 else parts[0] if parts else None

    def parser(self, request: GenerationRequest, prompt: FormattedPrompt, index: int = 0) -> Splitter | None:
        """Parser that splits one sequence's reasoning from its answer; None where no reasoning can come."""
        if not isinstance(request.prompt, ChatPrompt) or not (self._prompts.thinks or self._marks.is_everywhere):
            return None
        tools = _callable(request)
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
        return ThinkingControl(
            parser,
            make_detokenizer(self._tokenizer).feed,
            start=self._start,
            end=self._end,
            answers=self._answers,
            call=self._call if request.format and _callable(request) else (),
            opened=prompt.tokens[-MAX_OPENED:],
            vocab_size=self._vocab_size,
            budget=self._budget(request),
            inner=answer,
        )


def _callable(request: GenerationRequest) -> tuple[Tool, ...]:
    """The tools that the model may call if it likes."""
    if not isinstance(request.prompt, ChatPrompt) or request.tool_choice.mode != "auto":
        return ()
    return request.prompt.tools
