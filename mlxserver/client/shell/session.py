"""What the shell knows between two lines: the conversation, the model, the settings and the figures so far.

Rule 1: a conversation remembers what was shown. An answer that was stopped stays as far as it came; one that was
        stopped before its first word, or failed, is forgotten together with its question, which can be asked again.
Rule 2: the server's models are asked of it; what is remembered of them is for completion and the context's length.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from mlxserver.client.api import ChatClient
from mlxserver.client.conversation import Conversation
from mlxserver.client.errors import ClientError, SettingInvalid
from mlxserver.client.live import LiveAnswer, ThinkingView
from mlxserver.client.models import ModelCard
from mlxserver.client.reply import Reply, ask
from mlxserver.client.stats import Timing
from mlxserver.client.status import format_context, format_status


class Leave(Exception):
    """The person wants to leave the shell."""


@dataclass
class Session:
    """One shell. params: what goes into every request. attached: files for the next question. asked: the last one."""

    client: ChatClient
    stdout: Console
    model: str
    conversation: Conversation = field(default_factory=Conversation)
    params: dict[str, Any] = field(default_factory=dict)
    streams: bool = True
    thinking: ThinkingView = "show"
    attached: list[str] = field(default_factory=list)
    asked: str | None = None
    cards: tuple[ModelCard, ...] = ()
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    async def refresh(self) -> Sequence[ModelCard]:
        """Ask the server for its models."""
        self.cards = tuple(await self.client.models())
        return self.cards

    @property
    def keys(self) -> list[str]:
        """The models that the server had when it was asked last."""
        return [card.key for card in self.cards]

    async def choose(self, key: str) -> None:
        """Talk to another model from now on. Raises SettingInvalid for one that the server does not have."""
        await self.refresh()
        if self.keys and key not in self.keys:
            raise SettingInvalid("model", key, expected_one_of(key, self.keys))
        self.model = key

    async def tell(self, text: str) -> None:
        """Ask a question with the attached files, show the answer, remember both."""
        question = "\n\n".join([*self.attached, text])
        await self.ask(question)
        self.attached = []

    async def ask(self, question: str) -> None:
        """Ask a question as it is, show the answer, remember both (rule 1)."""
        self.asked = question
        reply, messages = Reply(self.model), self.conversation.asking(question)
        try:
            with LiveAnswer(self.stdout, self.thinking) as answer:
                await ask(
                    self.client,
                    reply,
                    messages,
                    stream=self.streams,
                    on_event=answer.write,
                    on_progress=answer.tell,
                    **self.params,
                )
        finally:
            if reply.content and not reply.error:
                self.conversation = self.conversation.with_turn(question, reply.content)
        await self._report(reply)

    async def _report(self, reply: Reply) -> None:
        if timing := reply.timing:
            self.timings.setdefault(reply.model, []).append(timing)
            if self.context_length is None:
                # A model that was loaded by its first question tells its context only now.
                with suppress(ClientError):
                    await self.refresh()
            self.note(f"{format_status(reply.model, timing, self.context_length)}\n")

    @property
    def context_length(self) -> int | None:
        """Of the model in use, in tokens, as far as it is known."""
        return next((card.context_length for card in self.cards if card.key == self.model), None)

    @property
    def toolbar(self) -> str:
        """What stands below the line that is typed."""
        timings = self.timings.get(self.model, [])
        usage = timings[-1].usage if timings else None
        context = f" · context {format_context(usage, self.context_length)}" if usage else ""
        files = f" · {counted(len(self.attached), 'file')} attached" if self.attached else ""
        turns = counted(self.conversation.turns, "turn")
        return f" {self.model} · {turns}{context}{files} · Alt-Enter: new line · /help "

    def note(self, text: str, style: str = "dim") -> None:
        """A line that is no answer."""
        self.stdout.print(Text(text, style))


def counted(count: int, thing: str) -> str:
    """So many of a thing."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def expected_one_of(name: str, known: Sequence[str]) -> str:
    """What to say of a name that does not exist: the nearest one that does, or all."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"one that exists; did you mean {near[0]!r}?"
    return f"one of: {', '.join(known) or 'none'}"
