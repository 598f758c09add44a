"""Formatters of the log: a line of text, or a line of JSON, per event.

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
        pairs = " ".join(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)
        line = super().format(record)
        first, newline, rest = line.partition("\n")
        return f"{first} {pairs}{newline}{rest}" if pairs else line


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
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are of what any client may send
    for library in ("huggingface_hub", "transformers"):  # they install a handler of their own
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True


def _value(value: object) -> str:
    """A field's value: quoted where it has spaces, escaped where it holds control characters of a terminal."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if not text.isprintable():
        return json.dumps(text)
    return text if text and not set(text) & set(' "=') else orjson.dumps(text).decode()
