"""Images in the two clients, from files and the clipboard; and vectors of texts."""

import asyncio
import base64
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import advanced_client
import simple_client
from mlxserver.client.api import ChatClient
from mlxserver.client.conversation import Conversation
from mlxserver.client.errors import FileUnusable
from mlxserver.client.images import content_of, image_part, image_urls, paste_image, read_image
from mlxserver.client.shell.commands import run_line
from mlxserver.client.shell.session import Session
from mlxserver.client.transcript import format_json, format_markdown, load, parse_json, parse_markdown
from tests.support.images import SUFFIXES, file_of, half, png
from tests.support.scripted_server import CARDS, scripted_server

EMBEDDER = {"id": "minilm", "object": "model", "kind": "embedding", "status": {"value": "unloaded"}}
LOADED = {**EMBEDDER, "id": "other", "status": {"value": "loaded"}}


@pytest.fixture(scope="module")
def server():
    with scripted_server(cards=[EMBEDDER, LOADED, *CARDS]) as server:
        yield server


@pytest.fixture
def main(server, monkeypatch, capsys):
    """A client in this process: (exit status, stdout, stderr)."""

    def run_main(client, *arguments, piped=""):
        monkeypatch.setattr("sys.argv", ["client.py", "--base-url", server.url, *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        try:
            status = client.main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run_main


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    return path


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("format", SUFFIXES)
def test_the_type_of_an_image_is_found_by_its_content(format, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(file_of(half(), format))
    assert list(image_urls([read_image(path)])) == [data_url(path.read_bytes(), SUFFIXES[format])]


@pytest.mark.parametrize("client", [simple_client, advanced_client])
def test_images_are_sent_before_the_question(client, main, server, picture):
    status, out, _ = main(client, "--model", "talker", "--image", picture, "--image", picture, "What is it?")
    assert (status, out.strip()) == (0, "The capital is Paris.")
    image = {"type": "image_url", "image_url": {"url": data_url(png())}}
    content = [image, image, {"type": "text", "text": "What is it?"}]
    assert server.requests[-1]["messages"] == [{"role": "user", "content": content}]


@pytest.mark.parametrize("client", [simple_client, advanced_client])
def test_a_file_that_is_no_image_is_not_sent(client, main, server, tmp_path):
    path = tmp_path / "a.svg"
    path.write_text("<svg/>")
    sent = len(server.requests)
    for name in (path, tmp_path / "missing.png", tmp_path):
        status, _, err = main(client, "--model", "talker", "--image", name, "What?")
        assert status == 1
        assert str(name) in err
    assert len(server.requests) == sent


@pytest.mark.parametrize("ending", ["json", "md"])
def test_a_saved_conversation_keeps_its_images(ending, main, picture, tmp_path):
    path = tmp_path / f"talk.{ending}"
    assert main(advanced_client, "--model", "talker", "--image", picture, "--save", path, "What?")[0] == 0
    content = content_of("What?", [image_part(png())])
    assert load(path) == Conversation().with_turn(content, "The capital is Paris.")


LINES = st.sampled_from(
    [
        "## user",
        "![image](data:image/png;base64,QUJD)",
        "\\![image](data:image/png;base64,QUJD)",
        "",
        "x",
        "![image](y)",
    ]
)
TEXTS = st.lists(LINES | st.text(st.characters(exclude_categories=["Cs"])), min_size=1).map("\n".join).filter(bool)
PARTS = st.lists(st.sampled_from([image_part(png()), image_part(png((9, 9, 9)))]), min_size=1, max_size=3)


@given(PARTS, TEXTS, PARTS)
def test_images_among_texts_survive_both_formats(before, text, after):
    content = [*before, {"type": "text", "text": text}, *after]
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": text})
    for parse, format in ((parse_json, format_json), (parse_markdown, format_markdown)):
        assert parse(format(Conversation(messages))) == Conversation(messages)


async def shell(server, *lines):
    """A session of the shell after these lines, and what it showed."""
    shown = io.StringIO()
    async with ChatClient(server.url) as client:
        session = Session(client, Console(file=shown, width=120), "talker")
        for line in lines:
            await run_line(session, line)
    return session, shown.getvalue()


def test_an_image_goes_with_the_next_question_of_the_shell_and_with_a_retry(server, picture):
    session, shown = asyncio.run(shell(server, f"/image {picture}", "What?", "/retry", "And?"))
    assert "a.png (PNG, 1 kB) goes with the next question." in shown
    asked = [request["messages"] for request in server.requests[-3:]]
    content = content_of("What?", [image_part(png())])
    assert asked[0] == asked[1] == [{"role": "user", "content": content}]
    assert asked[2][-1] == {"role": "user", "content": "And?"}
    assert session.conversation.turns == 2
    assert "1 image attached" not in session.toolbar
    session, _ = asyncio.run(shell(server, f"/image {picture}"))
    assert "1 image attached" in session.toolbar
    session, _ = asyncio.run(shell(server, f"/image {picture}", "/new"))
    assert not session.images


def with_tools(monkeypatch, folder, **tools):
    """A PATH that has these tools alone, each a file of Python that prints the given bytes."""
    for name, data in tools.items():
        tool = folder / name.replace("_", "-")
        tool.write_text(f"#!/bin/sh\nexec /bin/cat {folder / 'pasted'}\n")
        tool.chmod(0o755)
        (folder / "pasted").write_bytes(data)
    monkeypatch.setenv("PATH", os.fspath(folder))


@pytest.mark.parametrize("tool", ["pngpaste", "wl_paste", "xclip"])
def test_an_image_is_pasted_from_the_clipboard(tool, monkeypatch, tmp_path):
    with_tools(monkeypatch, tmp_path, **{tool: png()})
    assert paste_image() == image_part(png())


@pytest.mark.parametrize(
    ("tools", "words"),
    [({}, "none of the tools that read images"), ({"xclip": b""}, "no image"), ({"xclip": b"text"}, "no image")],
)
def test_a_clipboard_without_an_image_or_a_tool_is_a_clear_line(tools, words, monkeypatch, tmp_path):
    with_tools(monkeypatch, tmp_path, **tools)
    with pytest.raises(FileUnusable, match=words):
        paste_image()


def test_texts_become_lines_of_numbers(main, server):
    status, out, err = main(simple_client, "--embed", "a", "b c")
    assert (status, out) == (0, "0.5 -1\n1.5 -1\n")
    assert "model: other" in err  # it is loaded
    assert server.requests[-1] == {"model": "other", "input": ["a", "b c"], "encoding_format": "float"}


def test_lines_of_a_pipe_become_one_object(main):
    status, out, _ = main(simple_client, "--model", "minilm", "--json", "--embed", piped="a\n\nb\n")
    embeddings = [{"text": "a", "embedding": [0.5, -1.0]}, {"text": "b", "embedding": [1.5, -1.0]}]
    assert (status, json.loads(out)) == (0, {"model": "minilm", "embeddings": embeddings, "prompt_tokens": 6})


def test_wrong_uses_of_embed_are_refused(main):
    assert main(simple_client, "--embed")[0] == 2
    assert main(simple_client, "--json", "hello")[0] == 2
    assert main(simple_client, "--embed", "bad")[0] == 1
    with scripted_server() as other:
        status, _, err = main(simple_client, "--base-url", other.url, "--embed", "a")
    assert status == 2
    assert "embedding model" in err


def test_an_embedding_model_is_not_asked_a_question(main):
    assert "model: talker" in main(simple_client, "hello")[2]


BENCHMARK = ("--concurrency", "1,2", "--requests", "3", "--warmup", "1")


def test_a_benchmark_of_an_embedding_model_counts_texts_and_tokens(main, server, tmp_path):
    path = tmp_path / "figures.csv"
    sent = len(server.requests)
    status, out, _ = main(advanced_client, "--benchmark", "minilm", *BENCHMARK, "--json", "--output", path)
    levels = json.loads(out)["levels"]
    assert status == 0
    assert [(level["load"], level["texts"], level["tokens"], level["errors"]) for level in levels] == [
        ("c=1", 48, 144, 0),
        ("c=2", 48, 144, 0),
    ]
    assert all(level["texts_per_second"] > 0 and level["p99_ms"] > 0 for level in levels)
    assert len(server.requests) - sent == 2 * (3 + 1)
    assert path.read_text().startswith("model,load,concurrency,requests,errors,texts,tokens")
    lines = main(advanced_client, "--benchmark", "minilm", *BENCHMARK)[1].splitlines()
    assert lines[0] == "\tminilm c=1\tminilm c=2"
    assert lines[1].startswith("texts per second\t")


def test_what_a_benchmark_of_an_embedding_model_has_not_is_refused(main):
    assert main(advanced_client, "--benchmark", "minilm,talker")[0] == 2
    assert main(advanced_client, "--benchmark", "minilm", "--slo", "ttft=5")[0] == 2
