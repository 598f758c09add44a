"""What a request binds its rows to: a grammar, a budget of reasoning, a length.

Rule 1: a grammar of forced calls goes before one of JSON, that before one of strict tools.
Rule 2: nothing here but compile() may run on another thread than the engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxserver.engine.output.detokenizer import make_detokenizer
from mlxserver.engine.output.thinking import ThinkingParser
from mlxserver.engine.prompt.formats import PromptFormat, thinking_tags
from mlxserver.engine.requests import ChatPrompt, FormattedPrompt, GenerationRequest
from mlxserver.engine.sampling.constraints import Every, Restricted, ThinkingControl
from mlxserver.engine.sampling.grammars import Grammar, Grammars, json_grammar
from mlxserver.engine.sampling.tool_grammars import forced_calls, strict_calls
from mlxserver.engine.sequence import Constraint

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class RequestConstraints:
    """Makes the constraints, and the parsers of reasoning, of one model's requests."""

    def __init__(self, tokenizer: TokenizerWrapper, prompts: PromptFormat, grammars: Grammars, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._tool_format = prompts.tool_format  # found out by trying, on the thread that has the tokenizer
        self._grammars = grammars
        self._vocab_size = vocab_size

    def compile(self, request: GenerationRequest) -> None:
        """Compile the grammar that a request needs, if any. May run on any thread. Raises PromptRejected."""
        if grammar := self.grammar(request):
            self._grammars.compile(grammar)

    def grammar(self, request: GenerationRequest) -> Grammar | None:
        """What the answer must be: forced calls of tools, JSON, or calls among words. Raises PromptRejected."""
        tools = request.prompt.tools if isinstance(request.prompt, ChatPrompt) else ()
        if tools and request.tool_choice.mode in ("required", "function"):
            return forced_calls(tools, request.tool_choice)
        if request.format:
            return json_grammar(request.format.schema, "response_format")
        if request.tool_choice.mode == "none":
            return None
        return strict_calls(tools, self._tool_format, self._grammars.is_special)

    def constraint(
        self, request: GenerationRequest, prompt: FormattedPrompt, grammar: Grammar | None
    ) -> Constraint | None:
        """What binds one row, the request's grammar among it; None for a row that is free. Raises PromptRejected."""
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
        """What tells one row's reasoning from its answer; None where there is none to come."""
        if not self._prompts.thinks or not isinstance(request.prompt, ChatPrompt):
            return None
        return ThinkingParser(
            *thinking_tags(self._tokenizer),
            starts_inside=prompt.opens_thinking,
            may_close_twice=self._budget(request) is not None,
        )

    def _budget(self, request: GenerationRequest) -> int | None:
        """Most tokens of reasoning: none where it is switched off and the template has no such switch."""
        return 0 if self._prompts.must_not_think(request.prompt) else request.thinking_budget

    def _thinking_control(
        self, parser: ThinkingParser, answer: Constraint | None, budget: int | None
    ) -> ThinkingControl:
        start_tag, end_tag = thinking_tags(self._tokenizer)
        # With the line breaks that models set round it: a bare tag in mid-sentence would not stop a small model.
        written = (start_tag, f"\n{end_tag}\n\n")
        start, end = (self._tokenizer.encode(text, add_special_tokens=False) for text in written)
        return ThinkingControl(
            parser,
            make_detokenizer(self._tokenizer).feed,
            start=start,
            end=end,
            vocab_size=self._vocab_size,
            budget=budget,
            inner=answer,
        )
