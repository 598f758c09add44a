"""Ids of responses and of their items."""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

# Of a response, a message, calls of a function and of a custom tool, reasoning, and the results of both kinds of call.
Prefix = Literal["resp", "msg", "fc", "ctc", "rs", "fco", "ctco"]


def new_id(prefix: Prefix) -> str:
    """An id that no other object has."""
    return f"{prefix}_{uuid4().hex}"
