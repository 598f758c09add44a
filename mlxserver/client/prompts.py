"""Where a prompt comes from: the command line, a pipe, or a person who types line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress

from mlxserver.client.errors import SettingInvalid


def read_prompt(argument: str | None) -> str | None:
    """The argument, then a blank line and what is piped in; None when a person is there to type instead.

    Reads a pipe to its end. Raises SettingInvalid when all that makes an empty prompt.
    """
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    if is_typed and argument is None:
        return None
    piped = "" if is_typed or sys.stdin is None else sys.stdin.read().strip("\n")
    prompt = "\n\n".join(text for text in (argument, piped) if text)
    if not prompt.strip():
        raise SettingInvalid("PROMPT", prompt, "text as the argument or on stdin")
    return prompt


def typed_lines() -> Iterator[str]:
    """What a person types, line by line until Ctrl-D, without empty lines. Ctrl-C drops the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines once it is imported
    while True:
        try:
            line = input(_invite())
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line


def _invite() -> str:
    """input()'s prompt; it would go into a stdout that is no terminal, so there stderr has it."""
    if sys.stdout.isatty():
        return "> "
    print("> ", end="", file=sys.stderr, flush=True)
    return ""
