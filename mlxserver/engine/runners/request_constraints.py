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
from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.prompt.formats import PromptFormat, thinking_tags
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt, GenerationRequest, Grammar, JsonFormat, ToolChoice
from mlxserver.engine.sampling.constraints import Every, Restricted, ThinkingControl
from mlxserver.engine.sampling.grammars import Grammars
from mlxserver.engine.sampling.json_grammars import json_grammar
from mlxserver.engine.sampling.tool_grammars import calls_or_answer, forced_calls, strict_calls
from mlxserver.engine.sequence import Constraint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class RequestConstraints:
    """Makes the constraints, and the thinking parsers, of one model's requests."""

    def __init__(self, tokenizer: TokenizerWrapper, prompts: PromptFormat, grammars: Grammars, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._grammars = grammars
        self._vocab_size = vocab_size
        self.tool_format = prompts.tool_format
        self._tags = thinking_tags(tokenizer)
        # With the line breaks that models set round it: a bare tag in mid-sentence would not stop a small model.
        written = (self._tags[0], f"\n{self._tags[1]}\n\n") if prompts.thinks else ("", "")
        self._start, self._end = (tokenizer.encode(text, add_special_tokens=False) if text else [] for text in written)

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
        answer = self._grammars.constraint(grammar) if grammar else None
        parser, budget = self.parser(request, prompt), self._budget(request)
        if parser and (answer or budget is not None):
            parts.append(self._thinking_control(parser, answer, budget))
        elif answer:
            parts.append(answer)
        return Every(parts) if len(parts) > 1 else parts[0] if parts else None

    def parser(self, request: GenerationRequest, prompt: FormattedPrompt) -> ThinkingParser | None:
        """Parser that splits one sequence's reasoning from its answer; None where no reasoning can come."""
        if not self._prompts.thinks or not isinstance(request.prompt, ChatPrompt):
            return None
        return ThinkingParser(
            *self._tags,
            starts_inside=prompt.opens_thinking,
            may_close_twice=self._budget(request) is not None,
        )

    def _budget(self, request: GenerationRequest) -> int | None:
        """Most tokens of reasoning: the request's, unless reasoning is off, else what its effort stands for."""
        budget = self._prompts.budget(request.prompt)
        return budget if budget == 0 or request.thinking_budget is None else request.thinking_budget

    def _thinking_control(
        self, parser: ThinkingParser, answer: Constraint | None, budget: int | None
    ) -> ThinkingControl:
        return ThinkingControl(
            parser,
            make_detokenizer(self._tokenizer).feed,
            start=self._start,
            end=self._end,
            vocab_size=self._vocab_size,
            budget=budget,
            inner=answer,
        )
