"""Output of the commands: a table in a terminal, lines with tabs elsewhere, JSON with --json."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mlxserver.client.views import STATE_STYLES, console

LONGEST_NAME = 48  # characters that a table has for the first column
SHORTEST_LAST = 18  # and for the last one, if it is not shorter
GAP = 2  # characters between two columns
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
    if not terminal.is_terminal:
        print("".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows), end="")
        return
    widths = _widths(columns, rows)
    for name in spare:
        if columns and sum(widths.values()) + GAP * (len(widths) - 1) > terminal.width:
            widths.pop(columns.index(name), None)
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=bool(columns))
    left = terminal.width - sum(widths.values()) - GAP * (len(widths) - 1)
    for n, width in widths.items():
        most = max(width, width + left) if columns and n == max(widths) else None
        heading = columns[n] if columns else ""
        table.add_column(heading, min_width=width, max_width=most, no_wrap=bool(columns), overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(row[n], "bold" if n == 0 else STATE_STYLES.get(row[n], "")) for n in widths))
    terminal.print(table)


def _widths(columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> dict[int, int]:
    """Characters that each column with a value needs, by its number."""
    shown = [n for n in range(len(rows[0]) if rows else 0) if n == 0 or any(row[n] != "-" for row in rows)]
    needed = {n: max(len(columns[n]) if columns else 0, *(len(row[n]) for row in rows)) for n in shown}
    limits = {shown[-1]: SHORTEST_LAST, 0: LONGEST_NAME} if shown else {}
    return {n: min(width, limits.get(n, width)) for n, width in needed.items()}


def count(number: int | None) -> str:
    """A number as people write it: 135M, 7.2B."""
    if not number:
        return "-"
    power = next((power for power in (9, 6, 3) if number >= 10**power), 0)
    return f"{number / 10**power:.3g}{NAMES_OF_POWERS[power]}"


def size(bytes: int | None) -> str:
    """A number of bytes as people write it."""
    return decimal(bytes) if bytes else "-"
