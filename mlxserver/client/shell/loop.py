"""Loop of the shell: read a line, run it, print its error, until Ctrl-D or /quit.

Rule 1: nothing that a server does ends the shell.
Rule 2: Ctrl-C stops the running command or answer, and only that; at the prompt it drops the line. Ctrl-D leaves.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from mlxserver.client.errors import ClientError
from mlxserver.client.shell.commands import run_line
from mlxserver.client.shell.line import LineReader
from mlxserver.client.shell.session import Leave, Session


async def run_shell(session: Session) -> None:
    """Run the loop. Raises ClientError if there is no server at its start."""
    await session.refresh()
    session.note(f"{session.client.base_url} · {session.model} · /help lists the commands, Ctrl-D leaves")
    reader = LineReader(session)
    try:
        while True:
            await _run_next_line(session, reader)
    except (EOFError, Leave):
        return


async def _run_next_line(session: Session, reader: LineReader) -> None:
    try:
        line = (await reader.read()).strip()
        if line and not await run_until_interrupt(run_line(session, line)):
            session.note("(stopped)")
    except KeyboardInterrupt:
        return
    except ClientError as error:
        session.note(f"error: {' '.join(str(error).split())}", "red")


async def run_until_interrupt(act: Coroutine[Any, Any, None]) -> bool:
    """Run to the end, or to Ctrl-C; whether it ended by itself."""
    task = asyncio.ensure_future(act)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await asyncio.wait({task})
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()
    if task.cancelled():
        return False
    task.result()
    return True
