"""Tables that fit a terminal: columns that can be spared are left out before any cell is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

STATE_STYLES = {"loaded": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}
LONGEST_NAME = 48  # characters that the first column gets before others are left out
SHORTEST_NAME = 20  # and that it keeps in a narrow terminal
SHORTEST_LAST = 18  # and for the last one, if it is not shorter
GAP = 2  # characters between two columns


def fitted(columns: Sequence[str] | None, rows: Sequence[Sequence[str]], room: int, spare: Sequence[str] = ()) -> Table:
    """A table for `room` characters. columns: headings; None for none, and rows that may wrap.

    A column without a value in any row is not shown, and those of `spare` are left out, in this order, as long as the
    table is too wide. Of the others the last one gives way first.
    """
    widths = _widths(columns, rows)
    for name in spare:
        if columns and _total(widths) > room:
            widths.pop(columns.index(name), None)
    if columns and widths:
        names, last = max(len(row[0]) for row in rows), max(widths)
        widths[0] += min(max(names - widths[0], 0), max(room - _total(widths), SHORTEST_NAME - widths[0]))
        widths[last] += max(room - _total(widths), 0)
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=bool(columns))
    for n, width in widths.items():
        wraps = n == 0 or not columns  # names are typed again: they are never cut
        table.add_column(
            columns[n] if columns else "",
            max_width=width if columns else None,
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        table.add_row(*(Text(row[n], "bold" if n == 0 else STATE_STYLES.get(row[n], "")) for n in widths))
    return table


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def _widths(columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> dict[int, int]:
    """Characters that each column with a value needs, by its number."""
    shown = [n for n in range(len(rows[0]) if rows else 0) if n == 0 or any(row[n] != "-" for row in rows)]
    needed = {n: max(len(columns[n]) if columns else 0, *(len(row[n]) for row in rows)) for n in shown}
    limits = {shown[-1]: SHORTEST_LAST, 0: LONGEST_NAME} if shown else {}
    return {n: min(width, limits.get(n, width)) for n, width in needed.items()}
