"""Session of the shell, its state between two lines: the conversation, the model, the settings, the figures.

Rule 1: the conversation holds what was shown. An answer that was stopped is kept as far as it came; one that was
        stopped before its first word, or failed, is dropped together with its question, which /retry can send again.
Rule 2: models are always requested from the server; `cards` serve completion and the context length alone.
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
from mlxserver.client.images import Content, Part, content_of
from mlxserver.client.live import LiveAnswer, ThinkingView
from mlxserver.client.models import ModelCard
from mlxserver.client.reply import Reply, ask
from mlxserver.client.stats import Timing
from mlxserver.client.views import format_context, format_status


class Leave(Exception):
    """The shell is to end."""


@dataclass
class Session:
    """State of one shell.

    params: go into every request. attached, images: go with the next question, files as text. asked: the last question.
    """

    client: ChatClient
    stdout: Console
    model: str
    conversation: Conversation = field(default_factory=Conversation)
    params: dict[str, Any] = field(default_factory=dict)
    streams: bool = True
    thinking: ThinkingView = "show"
    attached: list[str] = field(default_factory=list)
    images: list[Part] = field(default_factory=list)
    asked: Content | None = None
    cards: tuple[ModelCard, ...] = ()
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    async def refresh(self) -> Sequence[ModelCard]:
        """Request the models from the server."""
        self.cards = tuple(await self.client.models())
        return self.cards

    @property
    def keys(self) -> list[str]:
        """The keys of the models as of the last refresh."""
        return [card.key for card in self.cards]

    async def choose(self, key: str) -> None:
        """Switch to another model. Raises SettingInvalid for an unknown key."""
        await self.refresh()
        if self.keys and key not in self.keys:
            raise SettingInvalid("model", key, expected_one_of(key, self.keys))
        self.model = key

    async def send(self, text: str) -> None:
        """Ask a question with the attached files, show the answer, keep both (rule 1)."""
        question = "\n\n".join([*self.attached, text])
        await self.ask(content_of(question, self.images))
        self.attached, self.images = [], []

    async def ask(self, question: Content) -> None:
        """Ask a question as it is, show the answer, keep both (rule 1)."""
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
                    on_progress=answer.show_progress,
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
                # The context length of a model that this request has loaded is known from now on.
                with suppress(ClientError):
                    await self.refresh()
            self.note(f"{format_status(reply.model, timing, self.context_length)}\n")

    @property
    def context_length(self) -> int | None:
        """Context length of the current model in tokens; None if not known."""
        return next((card.context_length for card in self.cards if card.key == self.model), None)

    @property
    def toolbar(self) -> str:
        """The text below the input line."""
        timings = self.timings.get(self.model, [])
        usage = timings[-1].usage if timings else None
        context = f" · context {format_context(usage, self.context_length)}" if usage else ""
        files = f" · {counted(len(self.attached), 'file')} attached" if self.attached else ""
        images = f" · {counted(len(self.images), 'image')} attached" if self.images else ""
        turns = counted(self.conversation.turns, "turn")
        return f" {self.model} · {turns}{context}{files}{images} · Alt-Enter: new line · /help "

    def note(self, text: str, style: str = "dim") -> None:
        """Show a line that is no answer."""
        self.stdout.print(Text(text, style))


def counted(count: int, thing: str) -> str:
    """A count with its noun: "1 turn", "2 turns"."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def expected_one_of(name: str, known: Sequence[str]) -> str:
    """What is expected instead of an unknown name: the nearest known one, or one of all."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"one that exists; did you mean {near[0]!r}?"
    return f"one of: {', '.join(known) or 'none'}"
