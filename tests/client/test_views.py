"""Output of the clients: formats, and the streams that they are written to."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlxserver.client import views
from mlxserver.client.events import Content, Finished, Reasoning, Usage
from mlxserver.client.models import Loaded, ModelCard, Unloaded
from mlxserver.client.printer import AnswerPrinter, Paragraph
from mlxserver.client.stats import Timing

CARDS = [
    ModelCard("smollm2", "loaded", "instruction", "embedded:smollm2", 8192, 540_000_000, 1, 2),
    ModelCard("[bold]qwq", "unloaded", "thinking", "org/QwQ"),
    ModelCard("gpt"),
]


def drawn(renderable):
    page = io.StringIO()
    Console(file=page, width=200, color_system=None).print(renderable)
    return page.getvalue()


def test_the_table_of_models_has_a_dash_for_unknown_fields():
    header, *rows = [line.split() for line in drawn(views.format_models(CARDS, 200)).splitlines()]
    assert header == ["key", "state", "type", "memory", "requests", "context", "source"]
    assert rows[0] == [
        "smollm2",
        "loaded",
        "instruction",
        "540.0",
        "MB",
        "1",
        "+",
        "2",
        "waiting",
        "8192",
        "embedded:smollm2",
    ]
    assert rows[1] == ["[bold]qwq", "unloaded", "thinking", "-", "-", "-", "org/QwQ"]
    assert rows[2] == ["gpt", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("room", "shown"),
    [(80, "key state type memory context source"), (56, "key state memory context source"), (40, "key state memory")],
)
def test_a_narrow_table_of_models_has_fewer_columns_and_whole_cells(room, shown):
    card = replace(CARDS[0], source="mlx-community/Mistral-7B")
    header, row = drawn(views.format_models([card], room)).splitlines()
    assert header.split() == shown.split()
    assert len(row.rstrip()) <= room
    assert "540.0 MB" in row


def test_a_terminal_gets_whole_words_and_whole_commands():
    text = "There is none: start one with `make serve ARGS=1`, or name another one."
    lines = views.wrapped(text, 34, indent=2).splitlines()
    assert lines == ["There is none: start one with", "  `make serve ARGS=1`, or name", "  another one."]
    assert views.wrapped("a-word-that-is-too-long", 10) == "a-word-that-is-too-long"


def test_the_lines_of_models_have_their_cells_between_tabs():
    assert (
        views.format_model_lines(CARDS[1:])
        == "[bold]qwq\tunloaded\tthinking\t-\t-\t-\torg/QwQ\ngpt\t-\t-\t-\t-\t-\t-\n"
    )


def test_loading_and_unloading_are_one_line_each():
    assert views.format_loaded(Loaded("a", 1.26)) == "Loaded a in 1.3 s."
    assert views.format_loaded(Loaded("a")) == "Loaded a."
    assert views.format_unloaded(Unloaded("a", 3, 1, 540_000_000)) == (
        "Unloaded a: 3 requests completed, 1 aborted, 540.0 MB freed."
    )


def test_a_piped_list_is_lines_without_escape_sequences(capsys):
    views.print_models(CARDS)
    assert capsys.readouterr().out == views.format_model_lines(CARDS)


def test_the_answer_goes_to_stdout_and_the_thinking_to_stderr(capsys):
    printer = AnswerPrinter()
    for event in (Reasoning("17 +"), Reasoning(" 25\n"), Content("4"), Content("2\n\n"), Finished("stop")):
        printer.write(event)
    printer.end()
    assert capsys.readouterr() == ("42\n", "17 + 25\n")
    assert printer.content == "42\n\n"


def test_an_answer_that_stops_halfway_ends_its_line(capsys):
    printer = AnswerPrinter()
    printer.write(Content("The cap"))
    printer.end()
    assert capsys.readouterr() == ("The cap\n", "")


def test_an_answer_cut_at_the_limit_is_noted_on_stderr(capsys):
    printer = AnswerPrinter()
    printer.write(Content("So"))
    printer.write(Finished("length"))
    assert capsys.readouterr() == ("So\n", "(the answer reached its limit of tokens)\n")


def test_an_empty_answer_writes_nothing(capsys):
    printer = AnswerPrinter()
    printer.write(Finished("stop"))
    printer.end()
    assert capsys.readouterr() == ("", "")


def test_markup_and_escapes_of_an_answer_are_left_as_they_are(capsys):
    printer = AnswerPrinter()
    printer.write(Reasoning("[red]x[/red] :smile: 123"))
    printer.write(Content("[bold]\ty"))
    printer.end()
    assert capsys.readouterr() == ("[bold]\ty\n", "[red]x[/red] :smile: 123\n")


def test_an_error_is_one_line_on_stderr(capsys):
    views.print_error(ValueError("a\n  b\n"))
    assert capsys.readouterr() == ("", "error: a b\n")


@pytest.mark.parametrize(("no_color", "is_styled"), [(None, True), ("1", False)])
def test_no_color_means_no_escape_sequences_on_a_terminal(monkeypatch, no_color, is_styled):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    views.print_status("thinking")
    assert ("\x1b[2m" in terminal.getvalue()) is is_styled
    assert ("\x1b" in terminal.getvalue()) is is_styled


@given(st.text(alphabet="a\n", max_size=12), st.data())
def test_any_cut_of_a_text_is_written_the_same_with_one_newline_at_its_end(text, data):
    cut = data.draw(st.integers(0, len(text)))
    written = []
    paragraph = Paragraph(written.append)
    for piece in (text[:cut], text[cut:]):
        paragraph.add(piece)
    paragraph.end()
    assert "".join(written) == (text.rstrip("\n") + "\n" if text.strip("\n") else "")


def test_the_status_of_an_answer_leaves_out_unknown_figures():
    whole = Timing(0.0, 1.0, (0.25, 0.5, 0.75), 0.25, Usage(20, 3, 1, 8))
    expected = "m · 3 tokens (1 thinking) · 4.0 tokens/s · TTFT 250 ms · 8 cached · context 23/100"
    assert views.format_status("m", whole, 100) == expected
    assert views.format_status("m", Timing(0.0, 1.0), None) == "m"
