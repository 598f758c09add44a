"""Output of the commands: a table in a terminal, lines with tabs elsewhere, JSON with --json."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.filesize import decimal

from mlxserver.client.tables import fitted
from mlxserver.client.views import console

NAMES_OF_POWERS = {9: "B", 6: "M", 3: "k", 0: ""}


def print_json(value: object) -> int:
    """Print a result as JSON; the exit status."""
    print(json.dumps(value, indent=2))
    return 0


def print_rows(columns: Sequence[str] | None, rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> None:
    """A table in a terminal; elsewhere lines with tabs between their cells, without a header.

    A column without a value in any row is not shown in the table, and those of `spare` are left out, in this order, as
    long as the terminal is too narrow. Of the others the last one gives way first.
    """
    terminal = console()
    if not rows:
        return
    if not terminal.is_terminal:
        print("".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows), end="")
        return
    terminal.print(fitted(columns, rows, terminal.width, spare))


def count(number: int | None) -> str:
    """A number as people write it: 135M, 7.2B."""
    if not number:
        return "-"
    power = next((power for power in (9, 6, 3) if number >= 10**power), 0)
    return f"{number / 10**power:.3g}{NAMES_OF_POWERS[power]}"


def size(bytes: int | None) -> str:
    """A number of bytes as people write it."""
    return decimal(bytes) if bytes else "-"
