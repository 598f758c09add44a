"""The page in a real Chromium, at a real server with small models."""

import base64
import json
import math
import re
import shutil

import pytest
from playwright.sync_api import expect

from mlxserver.page.files import TYPES, page_file
from tests.support.browser import axe_source, running_browser
from tests.support.hub import hub_of
from tests.support.images import BLUE, RED, file_of, half
from tools.harness.models import scripted_model, tiny_llama
from tools.harness.running_server import eventually, running_server
from tools.harness.scripts import Script
from tools.harness.vision_models import tiny_vision

pytestmark = pytest.mark.timeout(600)  # the browser may have to be installed first

expect.set_options(timeout=60_000)
LONG_NAME = "a-model-with-a-very-long-name-that-goes-on-and-on-without-a-space-until-4bit"
KEY, ADMIN = "sk-user-0123456789", "sk-admin-0123456789"
MARKDOWN = """Some **bold** text.

```python
def add(a, b):
    return a + b
```

| a | b |
| - | -: |
| 1 | 2 |
"""
HOSTILE = """<script>window.hurt = 1</script><img src=x onerror="window.hurt = 1">

[one](javascript:window.hurt=1) [two](JAVASCRIPT:window.hurt=1) [three](data:text/html,<script>1</script>)
![four](javascript:window.hurt=1) [fine](https://example.org/?a=%22onclick=1) <svg onload=window.hurt=1>

```html"onmouseover="window.hurt=1
</code></pre><script>window.hurt = 1</script>
```

| broken | **table
|--
[unclosed](https://example.org
~~~
"""

DROP = """(picture) => {
    const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
    const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(".pane").dispatchEvent(event);
}"""
COPY = """(picture) => {
    const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
    return navigator.clipboard.write([new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) })]);
}"""


# Pixels above, in sight, and below; and the same once those above have not changed for some frames.
SCROLL = """() => {
    const e = document.querySelector(".scroller");
    return [e.scrollTop, e.clientHeight, e.scrollHeight - e.scrollTop - e.clientHeight];
}"""
SETTLED = f"""() => new Promise((resolve) => {{
    const now = {SCROLL};
    const wait = (last, same) => requestAnimationFrame(() => setTimeout(() => {{
        if (same > 8) resolve(now());
        else wait(now()[0], now()[0] === last ? same + 1 : 0);
    }}));
    wait(now()[0], 0);
}})"""
# The nearest to the end of some frames: thousands of tokens come in a second, some between a frame and a look at it.
NEAREST = """() => new Promise((resolve) => {
    const e = document.querySelector(".scroller");
    const look = (nearest, left) => requestAnimationFrame(() => setTimeout(() => {
        const now = Math.min(nearest, e.scrollHeight - e.scrollTop - e.clientHeight);
        if (now < 2 || !left) resolve(now);
        else look(now, left - 1);
    }));
    look(Infinity, 20);
})"""


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Directories of the models."""
    root = tmp_path_factory.mktemp("page")
    talks = {"hello": MARKDOWN, "forever": Script(["tick ", "tock "], endless=True), "hostile": HOSTILE}
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    thoughts = {"hello": "Let me think.\n</think>\n\nIt is four.", "tool": f"I call.\n</think>\n\n{call}"}
    thinker = scripted_model(root / "thinker", thoughts, generation_prompt="<think>\n", tokens=("<think>", "</think>"))
    tiny, broken = tiny_llama(root / "tiny"), root / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    return {
        "talker": scripted_model(root / "talker", talks),
        # Hundreds of tokens a second, not thousands: what a browser shows on two busy cores.
        "ticker": scripted_model(root / "ticker", {"forever": talks["forever"]}, layers=64),
        "thinker": thinker,
        "tiny": tiny,
        "eyes": tiny_vision(root / "eyes", "qwen2_5_vl"),
        "broken": broken,
        LONG_NAME: tiny,
    }


@pytest.fixture(scope="module")
def hub(paths):
    """A stand-in for the Hugging Face hub, which has one small model."""
    with hub_of({file.name: file.read_bytes() for file in paths["tiny"].iterdir()}) as hub:
        hub.listed = [{"id": "org/tiny", "downloads": 12_345, "likes": 1}]
        yield hub


@pytest.fixture(scope="module")
def server(paths, hub, tmp_path_factory):
    faults, home = tmp_path_factory.mktemp("faults"), tmp_path_factory.mktemp("home")
    places = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(home / "hub"), "HOME": str(home)}
    models = [flag for key, path in paths.items() for flag in ("--model", f"{key}={path}")]
    with running_server(
        "--no-defaults",
        *models,
        script="tests/support/faulty_server.py",
        variables={"FAULTS": str(faults), "MLX_SERVER_LIBRARY": "true", **places},
    ) as server:
        server.faults = faults
        yield server


@pytest.fixture
def page(browser, server):
    """A fresh profile's page. No script of it may fail, and nothing may be asked of another server."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: request.url.startswith((server.url, "data:", "blob:")) or problems.append(request.url),
    )
    page.goto(server.url)
    yield page
    context.close()
    assert problems == []


def show(page, view):
    page.get_by_role("navigation", name="Views").get_by_role("link", name=view, exact=True).click()


def ask(page, text, model=None):
    """Ask in a conversation; the answer's element."""
    if page.locator("#ask").count() == 0:
        show(page, "Chat")
    if model:
        page.get_by_label("Model", exact=True).select_option(model)
    before = page.locator(".turn.assistant").count()
    page.fill("#ask", text)
    page.keyboard.press("Enter")
    return page.locator(".turn.assistant").nth(before)


def is_answered(answer):
    expect(answer.locator(".figures")).to_contain_text("tokens")
    expect(answer).not_to_have_attribute("aria-busy", "true")


def card(page, key):
    return page.get_by_role("article", name=key, exact=True)


def test_the_page_is_small_and_every_file_of_its_table_is_there(server):
    assert sum(len(page_file(name).content) for name in TYPES) < 150_000
    for name in TYPES:
        answer = server.get(f"/page/{name}")
        assert (answer.status, answer.body) == (200, page_file(name).content)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert server.ask("GET", f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]}).status == 304


def test_no_other_file_is_served(server):
    for name in ("", "static/app.js", "files.py", "..%2ffiles.py", "%2e%2e/auth.py", "app.js/", "APP.JS", "%00app.js"):
        assert server.get(f"/page/{name}").status == 404, name


def test_a_model_is_loaded_with_progress_pinned_and_unloaded(page, server):
    (server.faults / "load").touch()
    tiny = card(page, "tiny")
    tiny.get_by_role("button", name="Load").click()
    expect(tiny.get_by_role("progressbar")).to_be_visible()
    expect(tiny.locator(".stage")).to_have_text("reading, 25 %")
    (server.faults / "load").unlink()
    expect(tiny.locator(".state")).to_have_text("loaded")
    expect(tiny.get_by_role("progressbar")).to_be_hidden()
    expect(page.locator(".memory .legend")).to_contain_text("tiny")
    tiny.get_by_role("button", name="Pin").click()
    expect(tiny.get_by_role("button", name="Pin")).to_have_attribute("aria-pressed", "true")
    assert server.model("tiny")["pinned"]
    choice = tiny.get_by_role("button", name=re.compile("^abort"))
    tiny.get_by_role("button", name="Unload").press("Enter")
    choice.press("Escape")
    expect(choice).to_be_hidden()
    expect(tiny.get_by_role("button", name="Unload")).to_be_focused()
    page.keyboard.press("Enter")
    choice.click()
    expect(tiny.locator(".state")).to_have_text("not loaded")


def test_an_answer_is_streamed_rendered_and_kept(page):
    answer = ask(page, "hello", "talker")
    is_answered(answer)
    expect(answer.locator("strong").first).to_have_text("bold")
    expect(answer.locator("pre .k").first).to_have_text("def")
    expect(answer.locator("td.right")).to_have_text("2")
    expect(answer.locator(".figures")).to_contain_text("tokens/s")
    page.reload()
    expect(page.locator(".turn.assistant strong").first).to_have_text("bold")


def test_an_answer_is_stopped_and_its_slot_is_freed(page, server):
    answer = ask(page, "forever", "talker")
    expect(answer.locator(".tail")).to_contain_text("tick tock")
    expect(page.locator(".names .name")).to_have_text(["forever"])  # it is kept from its first message on
    page.keyboard.press("Escape")
    expect(answer.locator(".figures")).to_contain_text("stopped")
    eventually(lambda: server.model("talker")["running_requests"] == 0)


def test_thinking_is_folded_and_calls_are_shown_and_answered(page):
    answer = ask(page, "hello", "thinker")
    is_answered(answer)
    expect(answer.locator(".thought")).to_be_hidden()
    answer.get_by_text("Thought", exact=True).click()
    expect(answer.locator(".thought")).to_have_text("Let me think.")
    expect(answer.locator(".text")).to_contain_text("It is four.")
    expect(answer.locator(".text")).not_to_contain_text("think")
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools", exact=True).click()
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    page.fill("#tools", json.dumps([{"type": "function", "function": {"name": "add", "parameters": parameters}}]))
    page.locator("#tools").dispatch_event("change")
    called = ask(page, "tool")
    expect(called.locator(".call strong")).to_have_text("add")
    expect(called.locator(".call pre")).to_contain_text('"a": 1')
    called.get_by_label("Result of add").fill("3")
    called.get_by_role("button", name="Give").click()
    expect(page.locator(".turn.tool")).to_have_text(re.compile("3"))
    expect(page.locator(".turn.assistant")).to_have_count(3)


def test_an_earlier_turn_is_edited_and_both_branches_stay(page):
    is_answered(ask(page, "hello", "talker"))
    first = page.locator(".turn.user").first
    first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("hello, once more")
    page.locator(".turn.user").first.get_by_role("button", name="Send").click()
    is_answered(page.locator(".turn.assistant").first)
    expect(page.locator(".turn.user .text")).to_have_text("hello, once more")
    expect(page.locator(".turn.user .branches")).to_contain_text("2/2")
    page.get_by_label("Branch before").first.click()
    expect(page.locator(".turn.user .text")).to_have_text("hello")
    page.locator(".turn.assistant").get_by_role("button", name="Retry").click()
    expect(page.locator(".turn.assistant .branches")).to_contain_text("2/2")


def test_a_conversation_is_exported_as_the_command_lines_read_it_and_imported(page, tmp_path):
    from mlxserver.client.transcript import load

    is_answered(ask(page, "hello\n## user\nthere", "talker"))
    for name, suffix in (("JSON", "json"), ("Markdown", "md")):
        page.get_by_role("button", name="Export").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        page.get_by_role("button", name="Close").click()
        file = tmp_path / f"talk.{suffix}"
        download.value.save_as(file)
        messages = load(file).messages
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert messages[0]["content"] == "hello\n## user\nthere"
        assert messages[1]["content"] == MARKDOWN
        page.locator("input[type=file][accept='.json,.md']").set_input_files(file)
        expect(page.locator(".names .name[aria-current]")).to_have_text("talk")
        expect(page.locator(".turn.user .text")).to_have_text("hello\n## user\nthere")
    page.get_by_role("button", name="Code").click()
    expect(page.get_by_role("dialog")).to_contain_text("curl http://127.0.0.1")
    expect(page.get_by_role("dialog")).to_contain_text("from openai import OpenAI")


def test_a_hostile_answer_is_harmless(page):
    answer = ask(page, "hostile", "talker")
    is_answered(answer)
    expect(answer.locator("a").first).to_have_attribute("href", "https://example.org/?a=%22onclick=1")
    page.reload()
    expect(page.locator(".turn.assistant")).to_contain_text("window.hurt")
    expect(page.locator(".turn.assistant a").first).to_be_visible()  # it was plain text until it was rendered
    links = [link.get_attribute("href") for link in page.locator(".turn.assistant a").all()]
    assert links and all(link.startswith("https://example.org") for link in links)
    assert page.locator(".turn.assistant script, .turn.assistant img, .turn.assistant svg").count() == 0
    assert page.evaluate("window.hurt") is None


def test_errors_are_shown_as_text(page):
    page.goto(page.url.partition("#")[0] + "#/chat")
    page.get_by_role("button", name="Settings").click()
    page.fill("#p-temperature", "9")
    page.locator("#p-temperature").dispatch_event("change")
    refused = ask(page, "hello", "talker")
    expect(refused.get_by_role("alert")).to_contain_text("400: Invalid value for 'temperature'")
    page.fill("#p-temperature", "")
    page.locator("#p-temperature").dispatch_event("change")
    failed = ask(page, "hello", "broken")
    expect(failed.get_by_role("alert")).to_contain_text(re.compile(r"^(400|503): "))


def test_an_image_is_dropped_shown_and_sent(page):
    show(page, "Chat")
    page.get_by_label("Model", exact=True).select_option("talker")
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    page.evaluate(DROP, dot)
    expect(page.locator(".thumb")).to_have_count(1)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hello")
    parts = json.loads(sent.value.post_data)["messages"][0]["content"]
    assert parts[0]["image_url"]["url"] == f"data:image/png;base64,{dot}"
    expect(page.locator(".turn.user img")).to_have_count(1)
    expect(page.locator(".turn.assistant")).to_contain_text(re.compile("tokens|400: "))


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_vision_model_sees_what_is_dropped_or_pasted(page, server, way):
    """Its answer is the one to the same picture over the API."""
    show(page, "Chat")
    page.get_by_label("Model", exact=True).select_option("eyes")
    page.get_by_role("button", name="Settings").click()
    for name, value in (("temperature", "0"), ("max_tokens", "12")):
        page.fill(f"#p-{name}", value)
        page.locator(f"#p-{name}").dispatch_event("change")
    page.get_by_role("button", name="Settings").click()
    picture = base64.b64encode(file_of(half(RED, BLUE, size=(48, 32)))).decode()
    if way == "drop":
        page.evaluate(DROP, picture)
    else:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.evaluate(COPY, picture)
        page.focus("#ask")
        page.keyboard.press("Control+v")
    expect(page.locator(".thumb")).to_have_count(1)
    sent = page.evaluate("document.querySelector('.thumb img').src")  # a browser writes its own PNG to the clipboard
    is_answered(ask(page, "What is it?"))
    expect(page.locator(".turn.user img")).to_have_count(1)
    (id,) = [each["id"] for each in page.evaluate("JSON.parse(localStorage['mlx.chats'])")]
    nodes = page.evaluate("(id) => Object.values(JSON.parse(localStorage[`mlx.chat.${id}`]).nodes)", id)
    seen, unseen = (
        server.chat("eyes", content, temperature=0, max_tokens=12).json
        for content in (
            [{"type": "image_url", "image_url": {"url": sent}}, {"type": "text", "text": "What is it?"}],
            "What is it?",
        )
    )
    assert nodes[-1]["content"] == seen["choices"][0]["message"]["content"]
    assert f"prompt {seen['usage']['prompt_tokens']}" in nodes[-1]["figures"]
    assert seen["usage"]["prompt_tokens"] > unseen["usage"]["prompt_tokens"]
    show(page, "Overview")
    expect(card(page, "eyes").locator(".facts")).to_contain_text("vision")
    expect(card(page, "eyes").get_by_role("link", name="Chat")).to_be_visible()


def test_the_end_of_an_answer_is_followed_until_the_reader_scrolls_up(page):
    answer = ask(page, "forever", "ticker")

    def scroll():
        return page.evaluate(SCROLL)

    def is_at_end():
        return page.evaluate(NEAREST) < 2

    eventually(lambda: scroll()[0] > 300)
    for width, height in ((360, 740), (1280, 500), (1280, 800), (900, 400)):
        page.set_viewport_size({"width": width, "height": height})
        eventually(is_at_end)
    page.locator(".scroller").hover()
    page.mouse.wheel(0, -60)
    eventually(lambda: scroll()[2] > 50)
    above, _, below = page.evaluate(SETTLED)  # the wheel turns for some frames
    eventually(lambda: scroll()[2] > below + 50)
    assert scroll()[0] == above
    page.mouse.wheel(0, 100_000)
    eventually(is_at_end)
    page.keyboard.press("Escape")
    expect(answer.locator(".figures")).to_contain_text("stopped")
    expect(page.locator(".turn[aria-busy]")).to_have_count(0)
    eventually(is_at_end)


def test_a_long_answer_is_rendered_in_parts(page):
    """One that is longer than the server renders in one piece, with code that must not be cut."""
    code = "```python\n" + "x = 1\n\n" * 4000 + "```\n\n"
    message = "Some **bold** words.\n\n" * 1500 + code + "And *more* of it.\n\n" * 3000
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": message}]
    file = {"name": "long.json", "mimeType": "application/json", "buffer": json.dumps({"messages": messages}).encode()}
    show(page, "Chat")
    page.locator("input[type=file][accept='.json,.md']").set_input_files(file)
    expect(page.locator(".turn.assistant strong")).to_have_count(1500)
    expect(page.locator(".turn.assistant em")).to_have_count(3000)
    expect(page.locator(".turn.assistant pre")).to_have_count(1)


def test_parts_of_a_reopened_answer_are_what_the_whole_would_be(page, server):
    blocks = (
        "A paragraph.\n\n",
        "1. one\n\n   more of it\n\n2. two\n\n   - a\n\n   - b\n\n10. ten\n\n",
        "```text\nx\n\n- y\n```\nA line behind it.\n\n",
        "> a quote\n\n> another\n\n",
        "- loose\n\n- list\n\n  ```python\n  x = 1\n\n  y = 2\n  ```\n\n      code in it\n\n* of another kind\n\n",
        "    indented code\n\n    that goes on\n\n# Heading\n",
        "| a | b |\n| - | - |\n| 1 | 2 |\n\n---\n\n",
    )
    text = "".join(blocks[(n * n + n // 7) % len(blocks)] for n in range(700))
    for number, message in enumerate((text, text + "See [the end].\n\n[the end]: https://example.org/\n"), 1):
        import_conversation(page, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": message}])
        expect(page.locator(".names .name")).to_have_count(number)
        expect(page.locator(".turn.assistant .plain-text")).to_have_count(0)
        body = json.dumps({"texts": [message]})
        (whole,) = server.ask("POST", "/v1/render", body).json["html"]
        expected, *parts = page.evaluate(
            """async (whole) => {
                const { setRendered } = await import(new URL("page/dom.js", location.href.split("#")[0]));
                const element = document.createElement("div");
                setRendered(element, whole);
                const parts = [...document.querySelector(".turn.assistant .text").children];
                return [element, ...parts].map((each) => each.innerHTML);
            }""",
            whole,
        )
        assert "".join(parts) == expected
        assert (len(parts) > 1) == (number == 1)  # a reference may be to any place


def test_an_outline_is_not_clipped_and_scrollbars_have_the_colours_of_the_scheme(page):
    is_answered(ask(page, "hello", "talker"))
    page.locator(".turn.user").get_by_role("button", name="Edit").click()
    field, turn = page.get_by_label("Edit the message"), page.locator(".turn.user")
    expect(field).to_be_focused()
    inner, outer = field.bounding_box(), turn.bounding_box()
    width, offset = field.evaluate(
        "(e) => [getComputedStyle(e).outlineWidth, getComputedStyle(e).outlineOffset].map(parseFloat)"
    )
    assert width + offset > 0
    assert inner["x"] - (width + offset) >= outer["x"]
    assert inner["x"] + inner["width"] + width + offset <= outer["x"] + outer["width"]
    seen = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.querySelector('.scroller'))"
        assert page.evaluate(f"{style}.colorScheme") == scheme
        seen.add(page.evaluate(f"{style}.scrollbarColor"))
    assert len(seen) == 2


def test_a_model_is_found_pulled_with_progress_and_loaded(page, hub, server):
    show(page, "Library")
    page.fill("#words", "tiny")
    page.get_by_role("button", name="Search").click()
    found = page.get_by_role("article", name="org/tiny", exact=True)
    expect(found).to_contain_text("12,345 downloads")
    hub.most = hub.sent + 100_000
    found.get_by_role("button", name="Pull").click()
    expect(page.get_by_role("progressbar", name="Pull of org/tiny")).to_be_visible()
    expect(page.get_by_text(re.compile("downloading: .* of "))).to_be_visible()
    hub.most = math.inf
    here = page.locator("section", has=page.get_by_role("heading", name="On this machine"))
    mine = here.get_by_role("article", name="org/tiny", exact=True)
    expect(mine).to_contain_text("fits now")
    mine.get_by_role("button", name="Load").click()
    expect(mine.get_by_role("button", name="Loaded")).to_be_visible()
    assert server.status("org/tiny") == "loaded"


def test_models_are_compared(page):
    show(page, "Compare")
    for key in ("talker", "ticker", "thinker", "tiny", "eyes"):
        page.get_by_role("checkbox", name=key, exact=True).set_checked(key in ("talker", "thinker"))
    page.fill("#compare-ask", "hello")
    page.keyboard.press("Control+Enter")
    table = page.get_by_role("region", name="Figures")
    expect(table.get_by_role("columnheader")).to_have_text(["talker", "thinker"])
    expect(page.get_by_role("region", name="thinker")).to_contain_text("It is four.")
    expect(page.get_by_role("region", name="talker")).to_contain_text("Some bold text.")
    expect(table.get_by_role("row", name=re.compile("^Tokens "))).not_to_contain_text("–")


def test_a_benchmark_is_run_and_plotted(page):
    page.goto(page.url.partition("#")[0] + "#/bench")
    for key in ("talker", "ticker", "thinker", "tiny", "eyes"):
        page.get_by_role("checkbox", name=key, exact=True).set_checked(key == "talker")
    page.fill("#b-concurrency", "1,2")
    page.fill("#b-requests", "3")
    page.fill("#b-tokens", "8")
    page.get_by_role("button", name="Measure").click()
    expect(page.locator("figure")).to_have_count(3)
    expect(page.get_by_role("region", name="Figures").locator("tbody tr")).to_have_count(2)
    expect(page.get_by_role("button", name="Measure")).to_be_enabled()


def test_requests_are_listed_and_traced(page, server):
    assert server.chat("talker", "hello").status == 200
    assert server.chat("talker", "hello", temperature=9).status == 400
    show(page, "Requests")
    expect(page.locator("tr[data-outcome=error]").first).to_be_visible()
    page.fill("#filter", "talker stop")
    page.locator("tbody tr").first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".lane-row", has_text="Answer")).to_contain_text("tokens")
    expect(dialog).to_contain_text("log_contents")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_a_refused_request_is_listed_with_what_it_named(page, server):
    """As text, whatever it is, with the program that sent it; two with one id are two rows."""
    name, headers = "<img src=x onerror=window.hurt=1>", {"X-Request-Id": "twice", "User-Agent": "tester/3.0"}
    for _ in range(2):
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hello"}]})
        assert server.ask("POST", "/v1/messages", body, headers).status == 404
    show(page, "Requests")
    page.fill("#filter", "tester/3.0")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first.locator("td").nth(1)).to_have_text(name)
    expect(rows.first.locator("td").nth(2)).to_have_text("anthropic")
    expect(rows.first.locator("td").nth(3)).to_contain_text("404: Model '<img")
    expect(rows.first.locator("td").last).to_contain_text("tester/3.0")
    rows.first.click()
    expect(page.get_by_role("dialog")).to_contain_text(name)
    page.keyboard.press("Escape")
    assert page.evaluate("window.hurt") is None


def test_requests_are_polled_by_what_is_new(page, server):
    assert server.chat("talker", "hello").status == 200
    show(page, "Requests")
    expect(page.locator("tbody tr").first).to_be_visible()
    before = page.locator("tbody tr").count()
    with page.expect_response(
        lambda response: "v1/requests?after=" in response.url and not response.json()["is_whole"]
    ):
        assert server.chat("talker", "hello").status == 200
    expect(page.locator("tbody tr")).to_have_count(before + 1)


# Which rules axe looks at. In the dark only colours differ from what it has seen in the light.
AXE_RULES = {"light": {}, "dark": {"runOnly": ["color-contrast", "link-in-text-block"]}}


@pytest.mark.parametrize("scheme", AXE_RULES)
def test_axe_finds_no_serious_fault_and_a_phone_needs_no_sideways_scrolling(browser, server, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(server.url)
    ask(page, "hello", "talker")
    is_answered(page.locator(".turn.assistant").first)
    axe = axe_source()
    for view in ("chat", "overview", "compare", "bench", "requests", "library"):
        page.goto(f"{server.url}#/{view}")
        expect(page.locator(f"#nav-{view}")).to_have_attribute("aria-current", "page")
        expect(page.locator("main h1")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") == 360, view
        boxes = page.locator("input[type=checkbox]")
        assert {round(box.bounding_box()["width"]) for box in boxes.all()} <= {18}, view
        page.evaluate(axe)
        found = page.evaluate("rules => axe.run(rules)", AXE_RULES[scheme])["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in serious] == [], (
            view
        )
    context.close()


@pytest.mark.parametrize("address", ["main", "/constructor", "/nothing", "/chat/new/%", "/%00/", "//"])
def test_any_address_shows_a_view(page, address):
    page.goto(page.url.partition("#")[0] + "#" + address)
    page.reload()
    expect(page.locator("main h1")).to_have_count(1)


def test_the_link_to_the_content_leads_there_and_leaves_the_view(page):
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the content
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("main h1")).to_have_count(1)


def test_a_page_out_of_sight_reads_no_events(page):
    """A browser has six connections to a server; a seventh open page would wait for one."""

    def be(hidden):
        page.evaluate(
            "(hidden) => { Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });"
            "document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    page.clock.install()
    page.reload()
    expect(page.locator("#link")).to_have_text("Connected")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/events")):
        be(True)
        page.clock.fast_forward(6000)
    expect(page.locator("#notice")).to_be_hidden()
    with page.expect_request("**/v1/events"):
        be(False)
    expect(page.locator("#link")).to_have_text("Connected")


def test_a_key_is_asked_for_and_the_page_comes_back_after_its_server(browser, paths):
    flags = ("--no-defaults", "--model", f"talker={paths['talker']}", "--api-key", KEY, "--admin-key", ADMIN)
    context = browser.new_context()
    page = context.new_page()
    with running_server(*flags) as server:
        page.goto(server.url)
        page.get_by_label("Key", exact=True).fill("sk-wrong-0123456789")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("401")
        page.get_by_label("Key", exact=True).fill(KEY)
        page.get_by_role("button", name="Sign in").click()
        expect(card(page, "talker")).to_be_visible()
        expect(card(page, "talker").get_by_role("button", name="Load")).to_be_hidden()  # no admin
        (cookie,) = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert KEY not in cookie["value"]
        is_answered(ask(page, "hello", "talker"))
        server.process.kill()
        expect(page.get_by_text("The connection to the server is lost.")).to_be_visible()
        for view in ("Library", "Benchmark", "Chat"):
            show(page, view)
            expect(page.get_by_role("heading", level=1, name=view)).to_have_count(1)
    with running_server(*flags, "--port", str(server.port)):
        expect(page.get_by_text("The connection to the server is lost.")).to_be_hidden()
        expect(page.locator("#link")).to_have_text(re.compile("^Connected"))
        is_answered(ask(page, "hello"))
    context.close()


def import_conversation(page, messages):
    """Open a conversation as an imported file."""
    show(page, "Chat")
    file = {"name": "long.json", "mimeType": "application/json", "buffer": json.dumps({"messages": messages}).encode()}
    page.locator("input[type=file][accept='.json,.md']").set_input_files(file)


def numbered(turns, text):
    """A conversation whose messages begin with their numbers, and whose answers have a text."""
    texts = (("user", ""), ("assistant", text))
    return [
        {"role": role, "content": f"Message **{2 * n + is_answer}**.\n\n{more}"}
        for n in range(turns)
        for is_answer, (role, more) in enumerate(texts)
    ]


def test_answers_in_view_are_rendered_first_and_the_others_later(page):
    asked, held, holds = [], [], True

    def render(route):
        """The first one is what is in view; the rest waits until something else is."""
        asked.append(route.request.post_data_json)
        if holds and len(asked) > 1:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/render", render)
    import_conversation(page, numbered(30, "A line with `code` and *words*.\n\n" * 100))
    expect(page.locator(".turn.assistant").last.locator("strong").first).to_have_text("59")
    first = asked[0]["texts"]
    assert any("**59**" in text for text in first)
    assert all(int(re.search(r"\d+", text)[0]) > 50 for text in first)
    page.locator(".scroller").hover()
    page.mouse.wheel(0, -1_000_000)  # what comes into view goes before the rest
    eventually(lambda: page.evaluate(SETTLED)[0] == 0)
    holds = False
    for route in held:
        route.continue_()
    expect(page.locator(".turn.assistant").first.locator("strong").first).to_have_text("1")
    expect(page.locator(".turn.assistant .plain-text")).to_have_count(0)
    numbers = [int(re.search(r"\d+", text)[0]) for each in asked for text in each["texts"]]
    assert len(numbers) == len(set(numbers)) == 30
    assert numbers.index(1) < numbers.index(15)


# What is in view, and how far it is moved by what is laid out above it in the frames until it is asked for again.
WATCH = """() => {
    const scroller = document.querySelector(".scroller"), log = document.querySelector(".log");
    const box = scroller.getBoundingClientRect();
    window.seen = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2).closest(".turn");
    window.from = seen.getBoundingClientRect().top;
    window.tops = [];
    window.sizes?.disconnect();
    window.sizes = new ResizeObserver(() => tops.push(seen.getBoundingClientRect().top - from)); // behind the page's
    sizes.observe(log);
}"""
MOVED = """() => new Promise((resolve) => {
    const now = () => seen.getBoundingClientRect().top - from;
    const wait = (last, same) => requestAnimationFrame(() => setTimeout(() => {
        if (same > 8) resolve([now(), ...tops]);
        else wait(now(), now() === last ? same + 1 : 0);
    }));
    wait(now(), 0);
})"""


def test_what_is_in_view_stays_where_it_is_while_earlier_messages_are_laid_out(page):
    """Each turn of the wheel moves it by as much, in every frame, though much above it gets another height."""
    wide = "WWWW WWWW " * 100  # twice the height that the page guesses
    text = f"{wide}\n\n- one\n- two\n\n```python\nx = 1\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n"
    import_conversation(page, numbered(40, text * 2))
    expect(page.locator(".turn.assistant").last.locator("strong").first).to_have_text("79")
    page.locator(".scroller").hover()
    for _ in range(12):
        page.evaluate(WATCH)
        page.mouse.wheel(0, -350)
        eventually(lambda: page.evaluate("seen.getBoundingClientRect().top - from") > 300)
        end, *frames = page.evaluate(MOVED)
        assert abs(end - 350) <= 2
        assert all(-2 <= moved <= 352 for moved in frames), frames
    expect(page.locator(".turn.assistant .plain-text")).to_have_count(0)  # in a while all of it is rendered
    page.evaluate(WATCH)
    assert all(abs(moved) <= 2 for moved in page.evaluate(MOVED))


def test_a_branch_is_chosen_in_its_place_by_the_keyboard(page):
    import_conversation(page, numbered(12, "Some words.\n\n" * 20))
    page.get_by_label("Model", exact=True).select_option("talker")
    third = page.locator(".turn.user").nth(2)
    third.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("hello")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    answer = page.locator(".turn.assistant").nth(2)
    is_answered(answer)
    expect(page.locator("#ask")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(6)
    before = page.locator(".turn.user").nth(2).get_by_label("Branch before")
    top = before.bounding_box()["y"]
    before.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(24)
    expect(page.locator(".turn.user").nth(2)).to_contain_text("Message **4**")
    again = page.locator(".turn.user").nth(2).get_by_label("Branch before")
    expect(again).to_be_focused()
    eventually(lambda: abs(again.bounding_box()["y"] - top) <= 2)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(6)
    expect(page.locator(".turn.assistant").nth(2)).to_contain_text("Some bold text.")


def test_two_windows_share_a_conversation(page, server):
    """What one of them adds is in the other, and nothing is lost that both add."""
    is_answered(ask(page, "hello", "talker"))
    other = page.context.new_page()
    other.set_default_timeout(60_000)
    other.goto(f"{server.url}#/chat")
    expect(other.locator(".turn.assistant strong").first).to_have_text("bold")
    is_answered(ask(other, "hello, from the other"))
    expect(page.locator(".turn.user").nth(1)).to_contain_text("hello, from the other")
    is_answered(page.locator(".turn.assistant").nth(1))
    is_answered(ask(page, "hello, from the first"))
    expect(other.locator(".turn.user").nth(2)).to_contain_text("hello, from the first")
    other.reload()
    expect(other.locator(".turn.user .text")).to_have_text(["hello", "hello, from the other", "hello, from the first"])
    other.get_by_role("button", name="New conversation").click()
    is_answered(ask(other, "hello", "talker"))
    expect(page.locator(".names .name")).to_have_count(2)
    other.close()


def test_a_long_conversation_stays_fluent(page):
    """A hundred thousand tokens in view: the next keys and the next answer come without a hitch."""
    show(page, "Chat")
    message = "A sentence of some length, with **bold** words in it, and a list.\n\n- one\n- two\n\n" * 40
    messages = [{"role": role, "content": message} for _ in range(60) for role in ("user", "assistant")]
    file = {"name": "long.json", "mimeType": "application/json", "buffer": json.dumps({"messages": messages}).encode()}
    page.locator("input[type=file][accept='.json,.md']").set_input_files(file)
    expect(page.locator(".turn.assistant").last.locator("strong").first).to_be_visible()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed():
        """Seconds that the page's thread has computed, however long it had to wait for that on a busy machine."""
        figures = devtools.send("Performance.getMetrics")["metrics"]
        return next(each["value"] for each in figures if each["name"] == "TaskDuration")

    before = computed()
    page.locator("#ask").press_sequentially("twenty characters ..")
    assert computed() - before < 1
