"""Which model answers when none is named."""

from __future__ import annotations

from mlxserver.client.api import ChatClient
from mlxserver.client.errors import SettingInvalid
from mlxserver.client.views import print_status


async def choose_model(client: ChatClient) -> str:
    """The first model that is loaded, or the only one. A server that tells no states has loaded all of its models.

    Tells the choice on stderr. Raises SettingInvalid, and what ChatClient.models() raises.
    """
    cards = await client.models()
    keys = [card.key for card in cards]
    loaded = [card.key for card in cards if card.state in ("loaded", None)]
    if not loaded and len(keys) != 1:
        raise SettingInvalid("--model", "", f"a key, as no model is loaded; known: {', '.join(keys) or 'none'}")
    model = (loaded or keys)[0]
    print_status(f"model: {model}")
    return model
