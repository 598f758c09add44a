"""Tables that fit a terminal: columns that can be spared are left out before any cell is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

STATE_STYLES = {"loaded": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}
LONGEST_NAME = 48  # characters that a table has for the first column
SHORTEST_LAST = 18  # and for the last one, if it is not shorter
GAP = 2  # characters between two columns


def fitted(columns: Sequence[str] | None, rows: Sequence[Sequence[str]], room: int, spare: Sequence[str] = ()) -> Table:
    """A table for `room` characters. columns: headings; None for none, and rows that may wrap.

    A column without a value in any row is not shown, and those of `spare` are left out, in this order, as long as the
    table is too wide. Of the others the last one gives way first.
    """
    widths = _widths(columns, rows)
    for name in spare:
        if columns and sum(widths.values()) + GAP * (len(widths) - 1) > room:
            widths.pop(columns.index(name), None)
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=bool(columns))
    left = room - sum(widths.values()) - GAP * (len(widths) - 1)
    for n, width in widths.items():
        most = max(width, width + left) if columns and n == max(widths) else None
        heading = columns[n] if columns else ""
        table.add_column(heading, min_width=width, max_width=most, no_wrap=bool(columns), overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(row[n], "bold" if n == 0 else STATE_STYLES.get(row[n], "")) for n in widths))
    return table


def _widths(columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> dict[int, int]:
    """Characters that each column with a value needs, by its number."""
    shown = [n for n in range(len(rows[0]) if rows else 0) if n == 0 or any(row[n] != "-" for row in rows)]
    needed = {n: max(len(columns[n]) if columns else 0, *(len(row[n]) for row in rows)) for n in shown}
    limits = {shown[-1]: SHORTEST_LAST, 0: LONGEST_NAME} if shown else {}
    return {n: min(width, limits.get(n, width)) for n, width in needed.items()}
