"""How events are logged: a line for people, or a JSON object a line.

An event is a name and fields: log.info("request", extra={"fields": {...}}).
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

import orjson

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class TextFormatter(logging.Formatter):
    """The message, then the event's fields as name=value; those that are None are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        said = " ".join(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)
        line = super().format(record)
        first, newline, rest = line.partition("\n")
        return f"{first} {said}{newline}{rest}" if said else line


class JsonFormatter(logging.Formatter):
    """An object with time, level, logger and message, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()


def configure(level: str, format: str) -> None:
    """Log from this level on, in this format ("text" or "json"), to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of what any client may send, line by line
    for library in ("huggingface_hub", "transformers"):  # they bring a handler of their own
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True


def _value(value: object) -> str:
    """A field as it is told: quoted where it has spaces, escaped where a terminal would take it for a command."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if not text.isprintable():
        return json.dumps(text)
    return text if text and not set(text) & set(' "=') else orjson.dumps(text).decode()
