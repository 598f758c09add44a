"""Commands about the conversation."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mlxserver.client import transcript
from mlxserver.client.errors import SettingInvalid
from mlxserver.client.images import describe, paste_image, read_image
from mlxserver.client.shell.session import Session, counted
from mlxserver.client.transcript import quote_file


async def new(session: Session, argument: str) -> None:
    """Begin a new conversation; the system message stays."""
    session.conversation, session.attached, session.images = session.conversation.cleared(), [], []
    session.note("A new conversation.")


async def system(session: Session, argument: str) -> None:
    """Set the system message, or remove it."""
    session.conversation = session.conversation.with_system(argument)
    session.note("The system message is set." if argument else "There is no system message.")


async def retry(session: Session, argument: str) -> None:
    """Ask the last question again; the new answer replaces the old one."""
    if session.asked is None:
        raise SettingInvalid("/retry", "", "a question before it")
    before, asked = session.conversation, session.asked
    if before.last_content == asked:
        session.conversation = before.without_last_turn()
    try:
        await session.ask(asked)
    finally:
        if session.conversation.turns < before.turns:
            session.conversation = before


async def undo(session: Session, argument: str) -> None:
    """Remove the last turn."""
    if not session.conversation.turns:
        raise SettingInvalid("/undo", "", "a turn before it")
    question = session.conversation.last_question or ""
    session.conversation = session.conversation.without_last_turn()
    session.asked = session.conversation.last_content
    session.note(f"Forgotten: {question.splitlines()[0][:60] if question else ''}")


async def save(session: Session, argument: str) -> None:
    """Write the conversation to a file."""
    transcript.save(_path("/save", argument), session.conversation)
    session.note(f"Saved {counted(session.conversation.turns, 'turn')} to {argument}.")


async def open_(session: Session, argument: str) -> None:
    """Continue a conversation from a file."""
    session.conversation = transcript.load(_path("/open", argument))
    session.asked = session.conversation.last_content
    session.note(f"Opened {counted(session.conversation.turns, 'turn')} from {argument}.")


async def file(session: Session, argument: str) -> None:
    """Attach a file to the next question."""
    path = _path("/file", argument)
    quoted = quote_file(path)
    session.attached.append(quoted)
    session.note(f"{path.name} ({len(quoted)} characters) goes with the next question.")


async def image(session: Session, argument: str) -> None:
    """Attach an image to the next question: a file's, or without a name the clipboard's."""
    path = _path("/image", argument) if argument else None
    part = read_image(path) if path else await asyncio.to_thread(paste_image)
    session.images.append(part)
    session.note(f"{path.name if path else 'The image'} ({describe(part)}) goes with the next question.")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise SettingInvalid(command, argument, "the path of a file")
    return Path(argument).expanduser()
