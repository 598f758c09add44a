"""Switches: what a chat template does with enable_thinking and reasoning_effort, found by trying.

Rule 1: a variable has an effect where another value of it renders another text.
Rule 2: an effort that the template does not take is the nearest one that it takes; without any it is a token budget.
Rule 3: no value is refused here. What has no effect is left out, and logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.conversation import Message, Text
from mlxserver.engine.requests import ChatPrompt

log = logging.getLogger("engine")

THINKING = "enable_thinking"
EFFORT = "reasoning_effort"
EFFORT_NAMES = (EFFORT, "thinking_effort")
BUDGETS = {"minimal": 512, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768}
EFFORTS = (*BUDGETS, "max")
PRINTED_EFFORTS = ("low", "medium", "high")  # what models learn whose template prints any value
_NONSENSE = "nonsense"
_PROBE = (Message("user", (Text("Hello"),)),)


@dataclass(frozen=True, slots=True)
class Switch:
    """Variable of a template that turns the thinking on and off."""

    name: str
    on: Any
    off: Any


# In this order: the name that programs use, then the spellings of single families.
SPELLINGS = (
    Switch(THINKING, True, False),
    Switch("thinking", True, False),
    Switch("reasoning", True, False),
    Switch("thinking_mode", "enabled", "disabled"),
    Switch("thinking_mode", "on", "off"),
    Switch("thinking_option", "on", "off"),
    Switch(EFFORT, "high", "none"),
    Switch(EFFORT, "high", "no_think"),
    Switch("thinking_budget", -1, 0),
)


class Switches:
    """Switches of one chat template. try_render(prompt, opens_answer): the text, None where the template refuses it."""

    def __init__(self, try_render: Callable[[ChatPrompt, bool], str | None]) -> None:
        self._try_render = try_render

    @functools.cached_property
    def switch(self) -> Switch | None:
        """The variable that turns thinking off; None where none does."""
        return next((spelling for spelling in SPELLINGS if self._switches(spelling)), None)

    @functools.cached_property
    def efforts(self) -> tuple[str, ...]:
        """The efforts that the template takes, from the least to the most; none where they have no effect."""
        return self._find_efforts(self.effort_name)

    @functools.cached_property
    def effort_name(self) -> str:
        """The template's name of the effort."""
        return next(filter(self._find_efforts, EFFORT_NAMES), EFFORT)

    def _find_efforts(self, name: str) -> tuple[str, ...]:
        texts = {effort: self._text({THINKING: True, name: effort}) for effort in EFFORTS}
        taken = tuple(effort for effort, text in texts.items() if text is not None)
        if {texts[effort] for effort in taken} <= {self._text({THINKING: True})}:
            return ()
        return PRINTED_EFFORTS if taken == EFFORTS and self._prints(name) else taken

    def variables(self, given: Mapping[str, Any], *, thinks: bool) -> dict[str, Any]:
        """The template's variables for those that a client gave. thinks: whether the model's type does."""
        variables = {name: value for name, value in given.items() if name not in (THINKING, EFFORT)}
        if given.get(THINKING) and not thinks:
            log.debug("%s has no effect: this model answers without thinking", THINKING)
        is_on = thinks and not _is_off(given)
        effort = None if _is_off(given) else self._effort(given.get(EFFORT))
        if effort:
            variables[self.effort_name] = effort
        if switch := self.switch:
            variables.setdefault(switch.name, switch.on if is_on else switch.off)
        return {THINKING: is_on or not self._takes_off, **variables}

    def budget(self, given: Mapping[str, Any]) -> int | None:
        """Most tokens of reasoning where the template can't be asked for it: 0 for none, None for any number."""
        if _is_off(given):
            return None if self.switch else 0
        effort = given.get(EFFORT)
        return None if self.efforts or not isinstance(effort, str) else BUDGETS.get(effort)

    @functools.cached_property
    def _takes_off(self) -> bool:
        """Whether enable_thinking may be false; some templates refuse it."""
        return self._text({THINKING: False}) is not None

    def _effort(self, asked: Any) -> str | None:
        """The effort that the template takes for the one asked for; None where it has none."""
        if asked is None or asked in self.efforts:
            return asked  # type: ignore[no-any-return]
        if not self.efforts or asked not in EFFORTS:
            log.debug("%s %r has no effect in this chat template", EFFORT, asked)
            return None
        wanted = EFFORTS.index(asked)
        nearest = min(reversed(self.efforts), key=lambda effort: abs(EFFORTS.index(effort) - wanted))
        log.debug("%s %r is %r in this chat template", EFFORT, asked, nearest)
        return nearest

    def _switches(self, switch: Switch) -> bool:
        on, off = self._text({switch.name: switch.on}), self._text({switch.name: switch.off})
        if on is None or off is None or on == off:
            return False
        return switch.name != EFFORT or not self._prints(EFFORT)

    def _prints(self, name: str) -> bool:
        """Whether the template prints any effort as it is."""
        return _NONSENSE in (self._text({THINKING: True, name: _NONSENSE}) or "")

    def _text(self, variables: Mapping[str, Any]) -> str | None:
        return self._try_render(ChatPrompt(_PROBE, template_kwargs=variables), True)


def _is_off(given: Mapping[str, Any]) -> bool:
    """Whether a client turned the thinking off, by either variable."""
    return given.get(THINKING, given.get(EFFORT) != "none") is False
