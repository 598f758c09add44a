"""The same prompt to several models.

Rule: one that fails keeps its error; the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mlxserver.client.api import ChatClient, Message
from mlxserver.client.errors import ClientError
from mlxserver.client.reply import Reply, ask


async def compare(
    client: ChatClient, replies: Sequence[Reply], messages: Sequence[Message], *, sequential: bool, **params: Any
) -> None:
    """Fill the replies, all at once or one after the other."""

    async def fill(reply: Reply) -> None:
        with suppress(ClientError):
            await ask(client, reply, messages, **params)

    if not sequential:
        await asyncio.gather(*map(fill, replies))
        return
    for reply in replies:
        await fill(reply)
