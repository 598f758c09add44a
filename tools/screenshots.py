"""Screenshots of advanced_client.py from a real run: docs/shell.png, docs/compare.png, docs/benchmark.png.

    python tools/screenshots.py [shell] [compare] [benchmark]

Starts the server with its default models, runs the client in a terminal, types, and paints the terminal's screen cell
by cell, in the font of matplotlib, so that frames are unbroken whatever fonts a reader has.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tools.harness import terminal as terminals  # noqa: E402
from tools.harness.running_server import running_server  # noqa: E402

TIMEOUT = 300.0
DOCUMENTS = ROOT / "docs"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SIZE = 24  # pixels of the font: twice as large as it is shown, for sharp screens
MARGIN, TITLE, RADIUS = 24, 60, 16

BACKGROUND, FOREGROUND, FAINT, DESK = "#22262e", "#d7dae0", "#8b93a3", "#ffffff"
BUTTONS = ("#ff5f57", "#febc2e", "#28c840")
COLOURS = {
    "black": "#3f4451", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#d7dae0",
    "brightblack": "#8b93a3", "brightred": "#ff7b86", "brightgreen": "#b1e18b", "brightbrown": "#ffd68a",
    "brightblue": "#7cc3ff", "brightmagenta": "#de94f2", "bfightmagenta": "#de94f2",  # pyte spells it so
    "brightcyan": "#6fd6e3", "brightwhite": "#ffffff",
}  # fmt: skip

Row = Mapping[int, Any]  # cells of pyte by column


class Screen(terminals.Screen):
    """Screen with faint text in grey, as pyte does not support faint text."""

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        """Called by pyte for each change of colours."""
        if attributes[:1] == (2,):
            red, green, blue = bytes.fromhex(FAINT[1:])
            attributes = (38, 2, red, green, blue, *attributes[1:])
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
    """Write the screen and the scrollback of a terminal as docs/NAME.png."""
    screen = shown.screen
    rows = [*screen.history.top, *(screen.buffer[row] for row in range(screen.lines))]
    DOCUMENTS.mkdir(exist_ok=True)
    picture = paint(_without_gaps(rows, screen.columns), screen.columns, title)
    picture.quantize(method=Image.Quantize.MAXCOVERAGE).save(DOCUMENTS / f"{name}.png", optimize=True)


def _without_gaps(rows: Sequence[Row], columns: int) -> list[Row]:
    """The rows with at most one empty one between others, such as before the toolbar at the bottom, and none last."""
    is_blank = [not "".join(row[column].data for column in range(columns)).strip() for row in rows]
    kept = [row for n, row in enumerate(rows) if not (is_blank[n] and (n == 0 or is_blank[n - 1]))]
    return kept[:-1] if is_blank[-1] else kept


def paint(rows: Sequence[Row], columns: int, title: str) -> Image.Image:
    """A window with a title over rows of cells."""
    width, height = _cell_size()
    size = (2 * MARGIN + columns * width, TITLE + MARGIN + len(rows) * height)
    picture = Image.new("RGB", size, DESK)
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), RADIUS, BACKGROUND)
    for n, colour in enumerate(BUTTONS):
        draw.ellipse((MARGIN + 28 * n, 20, MARGIN + 28 * n + 16, 36), colour)
    draw.text((size[0] / 2, 28), title, FAINT, _font(False, False), anchor="mm")
    for n, row in enumerate(rows):
        for column in range(columns):
            _paint_cell(draw, (MARGIN + column * width, TITLE + n * height), row[column])
    return picture


def _paint_cell(draw: ImageDraw.ImageDraw, place: tuple[int, int], cell: Any) -> None:
    """One cell of pyte; what a wide character covers has no data."""
    width, height = _cell_size()
    foreground, background = _colour(cell.fg, FOREGROUND), _colour(cell.bg, BACKGROUND)
    if cell.reverse:
        foreground, background = background, foreground
    x, y = place
    if background != BACKGROUND:
        draw.rectangle((x, y, x + width - 1, y + height - 1), background)
    if cell.data.strip():
        draw.text(place, cell.data, foreground, _font(cell.bold, cell.italics))
    if cell.underscore:
        draw.line((x, y + height - 4, x + width - 1, y + height - 4), foreground, 2)


@cache
def _font(bold: bool, italic: bool) -> ImageFont.FreeTypeFont:
    style = f"{'Bold' * bold}{'Oblique' * italic}"
    return ImageFont.truetype(FONTS / f"DejaVuSansMono{'-' * bool(style)}{style}.ttf", SIZE)


@cache
def _cell_size() -> tuple[int, int]:
    """Width and height of a cell in pixels: a pixel less than frames and blocks are high, so that they meet."""
    font = _font(False, False)
    return round(font.getlength("M")), sum(font.getmetrics()) - 1


def _colour(name: str, default: str) -> str:
    """A colour of pyte, a name or six hexadecimal digits, as Pillow takes it."""
    return default if name == "default" else COLOURS.get(name, f"#{name}")


PICTURES: dict[str, Callable[[str, Path], None]] = {"shell": shell, "compare": compare, "benchmark": benchmark}


def main() -> None:
    """Make the named screenshots, or all three."""
    with tempfile.TemporaryDirectory() as home, running_server() as server:
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name](server.url, Path(home))
            print(f"docs/{name}.png", flush=True)


if __name__ == "__main__":
    main()
