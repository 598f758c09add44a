"""POST /v1/render, /page/session: the requests and their answers."""

from __future__ import annotations

from typing import Any

from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, invalid

MAX_TEXTS = 256
MAX_CHARACTERS = 400_000


def check_texts(value: Any, param: str) -> list[str]:
    """Texts, within the limits."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise invalid(param, value, "a list of strings")
    if len(value) > MAX_TEXTS or sum(map(len, value)) > MAX_CHARACTERS:
        raise ValidationFailed(f"At most {MAX_TEXTS} texts of {MAX_CHARACTERS} characters together.", param)
    return value


class RenderRequest(Request):
    """POST /v1/render."""

    texts: list[str] = Parameter(
        object,
        "Markdown texts.",
        required=True,
        check=check_texts,
        shape={"type": "array", "items": {"type": "string"}, "maxItems": MAX_TEXTS},
    )


class SessionRequest(Request):
    """POST /page/session."""

    key: str = Parameter(str, "An API key or an admin key.", required=True)


def rendered_texts(html: list[str]) -> dict[str, Any]:
    """Answer: the HTML of each text."""
    return {"html": html}


def session_object(*, needs_key: bool, may_generate: bool, may_manage: bool) -> dict[str, Any]:
    """Answer: whether the server asks for keys, and what this client may do."""
    return {"needs_key": needs_key, "may_generate": may_generate, "may_manage": may_manage}
