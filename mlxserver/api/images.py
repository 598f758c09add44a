"""Images on the wire -> images of the conversation.

Rule 1: base64 is decoded here. What the bytes are is found by their content, in the engine (engine/images.py).
Rule 2: a URL of http or https is kept for the server, which fetches it if it may (server/image_urls.py). Any other URL
        but a data URL is refused.
Rule 3: an error names the place, as in "messages[0].content[1].image_url.url".
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal

from mlxserver.api.schema.parameters import ValidationFailed, invalid
from mlxserver.engine.conversation import Image, Text

Detail = Literal["auto", "low", "high"]

DETAILS: Mapping[object, Detail] = {None: "auto", "auto": "auto", "low": "low", "high": "high", "original": "high"}
URL_EXPECTED = "a data URL such as 'data:image/png;base64,...', or a URL of http or https"
BASE64_EXPECTED = "the base64 of an image's bytes"
MAX_URL = 8192  # characters, where it is no data URL
SHOWN = 60  # characters of a wrong value, of which there may be millions
URL_SHAPE: dict[str, Any] = {"type": "string", "description": URL_EXPECTED}


def of_base64(value: Any, place: str, *, detail: Detail = "auto", origin: str = "") -> Image:
    """The image that a base64 text is. origin: where the whole image stands. Raises ValidationFailed."""
    if not isinstance(value, str):
        raise invalid(place, value, BASE64_EXPECTED)
    try:
        data = binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        try:  # MIME's base64 has lines; to split each text into them would cost time
            data = binascii.a2b_base64("".join(value.split()), strict_mode=True)
        except ValueError:
            raise invalid(place, value[:SHOWN], BASE64_EXPECTED) from None
    return Image(data, origin or place, detail=detail)


def of_url(value: Any, place: str, *, detail: Detail = "auto", origin: str = "") -> Image:
    """The image that a data URL has in it, or that the server is to fetch. Raises ValidationFailed."""
    if not isinstance(value, str):
        raise invalid(place, value, URL_EXPECTED)
    scheme = value[:8].lower()
    if scheme.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise invalid(place, value[:SHOWN], "a data URL with base64, such as 'data:image/png;base64,...'")
        return of_base64(data, place, detail=detail, origin=origin)
    if not scheme.startswith(("http://", "https://")) or len(value) > MAX_URL:
        raise invalid(place, value[:SHOWN], URL_EXPECTED)
    return Image(b"", origin or place, value, detail)


def check_detail(value: Any, place: str) -> Detail:
    """How much of its resolution the model gets. Raises ValidationFailed."""
    if not isinstance(value, str | None) or value not in DETAILS:
        raise invalid(place, value, "one of 'auto', 'low' and 'high'")
    return DETAILS[value]


def refuse_file(source: Mapping[str, Any], place: str, instead: str) -> None:
    """Refuse an image that is named by the id of a file. Raises ValidationFailed."""
    if source.get("file_id") is not None:
        place = f"{place}.file_id"
        raise ValidationFailed(f"'{place}' is not supported: no files are kept here. Send {instead}.", place)


def join_texts(parts: Iterable[Text | Image], between: str = "") -> Iterator[Text | Image]:
    """The parts in order, neighbouring texts as one, without empty ones."""
    for is_text, group in groupby(parts, lambda part: isinstance(part, Text)):
        if not is_text:
            yield from group
        elif text := between.join([part.text for part in group if isinstance(part, Text) and part.text]):
            yield Text(text)
