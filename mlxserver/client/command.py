"""How a command of ours starts and ends: its standard streams and its exit status."""

from __future__ import annotations

import io
import os
import sys

from mlxserver.client.errors import ClientError, ServerUnreachable, SettingInvalid
from mlxserver.client.views import print_error

EXIT_STATUSES = """exit status:
  0    fine
  1    the server answered with an error, or broke off
  2    wrong usage
  3    no server, or no answer from it
  130  interrupted"""

INTERRUPTED = 130


def accept_any_text() -> None:
    """Let no character fail that stdin or stdout can't encode: it becomes a question mark."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def conclude(error: ClientError | OSError) -> int:
    """Tell the error in one line; the exit status for it. That stdout's reader has left is no error."""
    if isinstance(error, OSError):
        # What stdout still holds can't be written; the interpreter would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(error, BrokenPipeError):
        return 0
    print_error(error)
    return {SettingInvalid: 2, ServerUnreachable: 3}.get(type(error), 1)
