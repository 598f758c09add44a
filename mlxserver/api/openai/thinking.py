"""Thinking switches: what clients write to turn the reasoning on or off, or to measure it, whatever they call it.

Rule 1: the switches of one request must agree. An effort beside reasoning that is off is no contradiction: off wins.
Rule 2: the variables of the chat template, which a request may set by name, win over every other switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from mlxserver.api.openai.generation import ModelRequest
from mlxserver.api.schema.json_schema import check_shape
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid

OFF = frozenset({"none", "off", "disabled", "false"})
UNSTATED = frozenset({"", "default", "auto"})  # efforts that leave the matter to the model

THINK: dict[str, Any] = {"type": ["boolean", "string"], "description": "true, false, or an effort such as 'low'"}
BUDGET = {"type": ["integer", "null"]}
SWITCH = {"type": ["boolean", "null"]}
THINKING: dict[str, Any] = {
    "type": ["object", "boolean"],
    "description": '{"type": "enabled", "budget_tokens": ...} or {"type": "disabled"}',
    "properties": {
        "type": {"enum": ["enabled", "disabled", "adaptive", "auto", "between_tools"]},
        "budget_tokens": BUDGET,
        "display": {},
        "keep": {},
        "clear_thinking": {},
        "include_thoughts": {},
    },
    "required": ["type"],
    "additionalProperties": False,
}
REASONING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "effort": {"type": ["string", "null"]},
        "enabled": SWITCH,
        "max_tokens": BUDGET,
        "exclude": {},
        "summary": {},
        "generate_summary": {},
        "context": {},
        "mode": {},
    },
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Thinking:
    """What one switch states, or all of them together. budget: most tokens of reasoning. None: not stated."""

    is_on: bool | None = None
    effort: str | None = None
    budget: int | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template: enable_thinking, or else reasoning_effort."""
        if self.is_on is False:  # on is what a thinking model is anyway, and no other can be
            return {"enable_thinking": False}
        return {} if self.effort is None else {"reasoning_effort": self.effort}


def of_effort(effort: str | None) -> Thinking:
    """What a reasoning effort states."""
    word = (effort or "").strip().lower()
    if word in OFF:
        return Thinking(is_on=False)
    return Thinking(effort=None if word in UNSTATED else word)


def of_budget(budget: int | None) -> Thinking:
    """What a budget states; -1 is no limit."""
    return Thinking(budget=None if budget == -1 else budget)


def check_think(value: Any, param: str) -> Thinking:
    """Ollama's `think`: a boolean or an effort. Raises ValidationFailed."""
    check_shape(value, THINK, param)
    return of_effort(value) if isinstance(value, str) else Thinking(is_on=value)


def check_thinking(value: Any, param: str) -> Thinking:
    """Anthropic's `thinking`, which others took over. Raises ValidationFailed."""
    check_shape(value, THINKING, param)
    if isinstance(value, bool):
        return Thinking(is_on=value)
    is_on = {"enabled": True, "disabled": False}.get(value["type"])
    return Thinking(is_on, budget=_budget(value.get("budget_tokens"), f"{param}.budget_tokens"))


def check_reasoning(value: Any, param: str) -> Thinking:
    """The object `reasoning` of OpenAI's responses and of OpenRouter. Raises ValidationFailed."""
    check_shape(value, REASONING, param)
    effort = of_effort(value.get("effort"))
    enabled, budget = value.get("enabled"), _budget(value.get("max_tokens"), f"{param}.max_tokens")
    return agreed({f"{param}.effort": effort, f"{param}.enabled": Thinking(enabled, budget=budget)})


def agreed(statements: Mapping[str, Thinking]) -> Thinking:
    """All that is stated, by the name of the parameter that states it. Raises ValidationFailed if they differ."""
    values: dict[str, Any] = {}
    for field in fields(Thinking):
        stated = {name: value for name, one in statements.items() if (value := getattr(one, field.name)) is not None}
        if len(set(stated.values())) > 1:
            names = " and ".join(f"'{name}'" for name in stated)
            raise ValidationFailed(f"{names} contradict each other. Send one of them.", next(iter(stated)))
        values[field.name] = next(iter(stated.values()), None)
    return Thinking(**values)


def _budget(value: int | None, param: str) -> int | None:
    if value is not None and not -1 <= value < 2**31:
        raise invalid(param, value, "an integer at least 0, or -1 for no limit")
    return of_budget(value).budget


class ThinkingRequest(ModelRequest):
    """How much the model is to think."""

    reasoning_effort: str | None = Parameter(
        str, "How much to think, such as low, medium or high; none turns thinking off. Any model takes any effort."
    )
    enable_thinking: bool | None = Parameter(bool, "false turns thinking off.")
    think: Thinking | None = Parameter(
        object, "false turns thinking off; a text is an effort.", check=check_think, shape=THINK
    )
    thinking: Thinking | None = Parameter(
        object, "The type disabled turns thinking off; budget_tokens limits it.", check=check_thinking, shape=THINKING
    )
    reasoning: Thinking | None = Parameter(
        object,
        "effort: as reasoning_effort. max_tokens: as thinking_budget. enabled: as enable_thinking.",
        check=check_reasoning,
        shape=REASONING,
    )
    chat_template_kwargs: dict[str, Any] = Parameter(
        dict, "Variables of the chat template, such as enable_thinking.", default={}
    )

    @property
    def named_switches(self) -> dict[str, Thinking]:
        """What the request states about thinking, by the name of each parameter."""
        named = {"think": self.think, "thinking": self.thinking, "reasoning": self.reasoning}
        return {
            "reasoning_effort": of_effort(self.reasoning_effort),
            "enable_thinking": Thinking(is_on=self.enable_thinking),
            **{name: stated for name, stated in named.items() if stated is not None},
        }

    @cached_property
    def switches(self) -> Thinking:
        """What the request states about thinking, under all names. Raises ValidationFailed if they differ."""
        return agreed(self.named_switches)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template: enable_thinking or reasoning_effort by the switches, and the given."""
        return self.switches.template_kwargs | self.chat_template_kwargs

    def check_together(self) -> None:
        """Refuse switches that contradict each other."""
        super().check_together()
        _ = self.switches
