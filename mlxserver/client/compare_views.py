"""Views of a comparison: replies side by side while it runs, then with a table of figures. format_* is pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from mlxserver.client.reply import Reply
from mlxserver.client.tables import fitted
from mlxserver.client.views import format_progress

FRAMES_PER_SECOND = 10
FIGURES = ("model", "TTFT ms", "tokens", "tokens/s", "thinking tokens", "finish reason")
SPARE_FIGURES = ("thinking tokens", "finish reason", "tokens")  # what a narrow terminal does not show


def live_replies(console: Console, replies: Sequence[Reply]) -> Live:
    """Live view of the last lines of all replies, while its `with` block lasts."""

    def draw() -> RenderableType:
        return format_side_by_side(replies, lambda reply: Tail(format_answer(reply), console.height - 6))

    return Live(get_renderable=draw, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True)


class Tail:
    """The last lines of another renderable."""

    def __init__(self, renderable: RenderableType, height: int) -> None:
        self._renderable, self._height = renderable, max(1, height)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._renderable, options, pad=False)[-self._height :]
        yield Segments([segment for line in lines for segment in (*line, Segment.line())])


def format_side_by_side(replies: Sequence[Reply], cell: Callable[[Reply], RenderableType]) -> Table:
    """The replies in columns of equal width."""
    table = Table(expand=True, header_style="bold")
    for reply in replies:
        table.add_column(Text(reply.model), ratio=1, overflow="fold")
    table.add_row(*(cell(reply) for reply in replies))
    return table


def format_answer(reply: Reply) -> RenderableType:
    """Reasoning dim, content as Markdown, an error red; the progress of what it waits for before any of these."""
    parts: list[RenderableType] = []
    if reply.progress and not reply.events and not reply.error:
        parts.append(Text(format_progress(reply.progress), "dim"))
    if reply.reasoning.strip():
        parts.append(Text(reply.reasoning.strip() + "\n", "dim"))
    if reply.content.strip():
        parts.append(Markdown(reply.content))
    if reply.error:
        parts.append(Text(f"error: {reply.error}", "red"))
    return Group(*parts)


def format_figures(replies: Sequence[Reply], room: int) -> Table:
    """A table of figures with one row per reply, for a terminal with so many characters per line."""
    return fitted(FIGURES, [figures_row(reply) for reply in replies], room, SPARE_FIGURES)


def figures_row(reply: Reply) -> tuple[str, ...]:
    """The cells of one reply, in the order of FIGURES. A dash stands for what is not known."""
    timing = reply.timing
    usage = timing.usage if timing else None
    return (
        reply.model,
        f"{timing.ttft * 1000:.0f}" if timing and timing.ttft is not None else "-",
        str(usage.completion_tokens) if usage else "-",
        f"{timing.tokens_per_second:.1f}" if timing and timing.tokens_per_second is not None else "-",
        str(usage.reasoning_tokens) if usage else "-",
        reply.outcome,
    )


def format_markdown(replies: Sequence[Reply]) -> str:
    """A Markdown document: one section per model, and the table."""
    sections = [f"## {reply.model}\n\n{_quoted(reply)}\n" for reply in replies]
    rows = [FIGURES, ("---",) * len(FIGURES), *(figures_row(reply) for reply in replies)]
    table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
    return "\n".join([*sections, table])


def format_plain(replies: Sequence[Reply]) -> str:
    """The replies one after the other, and the figures between tabs."""
    answers = [f"[{reply.model}]\n{reply.content.strip() or str(reply.error or '')}\n" for reply in replies]
    rows = ["\t".join(row) + "\n" for row in (FIGURES, *map(figures_row, replies))]
    return "\n".join([*answers, "".join(rows)])


def _quoted(reply: Reply) -> str:
    thinking = "".join(f"> {line}\n" for line in reply.reasoning.strip().splitlines())
    error = f"**error:** {reply.error}" if reply.error else ""
    return "\n\n".join(part.strip() for part in (thinking, reply.content, error) if part.strip())
