"""Screenshots of advanced_client.py from a real run: docs/shell.svg, docs/compare.svg, docs/benchmark.svg.

    python tools/screenshots.py

Starts the server with its default models, runs the client in a terminal, types, and exports the terminal's screen.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.harness import terminal as terminals  # noqa: E402
from tools.harness.running_server import running_server  # noqa: E402

GREY = (38, 5, 244)
TIMEOUT = 300.0
DOCUMENTS = ROOT / "docs"


class Screen(terminals.Screen):
    """Screen with faint text in grey, as pyte does not support faint text."""

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        """Called by pyte for each change of colours."""
        if attributes[:1] == (2,):
            attributes = (*GREY, *attributes[1:])
        super().select_graphic_rendition(*attributes, **({"private": True} if private else {}))


def shell(url: str, home: Path) -> None:
    """A conversation with Markdown, thinking, and a switch of the model."""
    options = ("--base-url", url, "--model", "smollm2", "--temperature", "0", "--max-tokens", "120")
    with terminals.terminal(*options, home=home, screen=Screen) as shown:
        shown.expect("\n>", within=TIMEOUT)
        shown.enter("What is the capital of France?")
        shown.expect("TTFT", within=TIMEOUT)
        shown.enter("/model smollm2-think")
        shown.expect("Now talking to smollm2-think.")
        shown.enter("/new")
        shown.expect("A new conversation.")
        shown.enter("What is 17 + 25?")
        shown.expect("17 + 25?", "TTFT", within=TIMEOUT)
        shown.enter("/models")
        shown.expect("requests", "QwQ", "\n>")
        export(shown, "shell", "advanced_client.py")


def compare(url: str, home: Path) -> None:
    """One question to two models."""
    options = ("--base-url", url, "--temperature", "0", "--max-tokens", "60", "--compare", "smollm2,smollm2-think")
    with terminals.terminal(*options, "What is 3 + 4?", home=home, screen=Screen) as shown:
        shown.expect("finish reason", "smollm2-think", within=TIMEOUT)
        shown.exit_status()
        export(shown, "compare", 'advanced_client.py --compare smollm2,smollm2-think "What is 3 + 4?"')


def benchmark(url: str, home: Path) -> None:
    """One model at three loads."""
    load = ("--concurrency", "1,4,8", "--requests", "16", "--max-tokens", "24", "--slo", "ttft=2000,itl=500")
    with terminals.terminal("--base-url", url, "--benchmark", "smollm2", *load, home=home, screen=Screen) as shown:
        shown.expect("end-to-end latency", within=TIMEOUT)
        shown.exit_status()
        export(shown, "benchmark", "advanced_client.py --benchmark smollm2 --concurrency 1,4,8")


def export(shown: terminals.Terminal, name: str, title: str) -> None:
    """Write the screen and the scrollback of a terminal as docs/NAME.svg."""
    screen = shown.screen
    rows = [*screen.history.top, *(screen.buffer[row] for row in range(screen.lines))]
    lines = [_line(row, screen.columns) for row in rows]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    console = Console(record=True, width=screen.columns, file=tempfile.TemporaryFile("w"))  # noqa: SIM115
    console.print(Text("\n").join(_without_gap(lines)))
    DOCUMENTS.mkdir(exist_ok=True)
    console.save_svg(str(DOCUMENTS / f"{name}.svg"), title=title)


def _without_gap(lines: Sequence[Text]) -> list[Text]:
    """Lines with one empty line where there are several, as between the prompt and the toolbar."""
    blank = [not line.plain.strip() for line in lines]
    return [line for n, line in enumerate(lines) if not (blank[n] and n and blank[n - 1])]


def _line(row: Any, columns: int) -> Text:
    line = Text(no_wrap=True)
    for style, cells in groupby((row[column] for column in range(columns)), _style):
        line.append("".join(cell.data for cell in cells), style)
    return line


def _style(cell: Any) -> Style:
    foreground, background = _colour(cell.fg), _colour(cell.bg)
    return Style(color=foreground, bgcolor=background, bold=cell.bold, italic=cell.italics, reverse=cell.reverse)


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    return f"#{name}" if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name.lower()) else NAMES[name]


NAMES = {
    **{name: name for name in ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")},
    "brown": "yellow",
    **{f"bright{name}": f"bright_{name}" for name in ("black", "red", "green", "blue", "magenta", "cyan", "white")},
    "brightbrown": "bright_yellow",
    "brightyellow": "bright_yellow",
    "bfightmagenta": "bright_magenta",
}


def main() -> None:
    """Make all three screenshots."""
    with tempfile.TemporaryDirectory() as home, running_server() as server:
        for picture in (shell, compare, benchmark):
            picture(server.url, Path(home))
            print(f"docs/{picture.__name__}.svg")


if __name__ == "__main__":
    main()
