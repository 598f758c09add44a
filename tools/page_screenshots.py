"""Screenshots of the page from a real run: docs/page/VIEW-SCHEME-DEVICE.png.

    python -m tools.page_screenshots [overview] [chat] [compare] [bench] [requests] [library]

Starts the server with its default models, talks to them in a real Chromium, and photographs each view in light and
dark, on a desktop and on a phone.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.browser import running_browser
from tools.harness import running_server as servers

FOLDER = Path(__file__).parent.parent / "docs" / "page"
DEVICES = {"desktop": (1280, 800), "phone": (390, 844)}
TIMEOUT = 900_000.0  # ms
TRAFFIC_SECONDS = 25.0
QUESTION = "What is the capital of France?"
CODE = "Write a Python function that adds two numbers."


def overview(page: Any, server: Any) -> None:
    """Both models at work."""
    page.locator(".card").first.wait_for()
    ended = threading.Event()

    def talk(model: str) -> None:
        while not ended.is_set():
            server.chat(model, "Tell me a story about the sea.", max_tokens=60)

    clients = [threading.Thread(target=talk, args=(model,)) for model in ("smollm2", "smollm2", "smollm2-think")]
    for client in clients:
        client.start()
    page.wait_for_timeout(TRAFFIC_SECONDS * 1000)
    photograph(page, "overview")
    ended.set()
    for client in clients:
        client.join()


def chat(page: Any, server: Any) -> None:
    """Two turns, one of a model that thinks."""
    page.get_by_role("button", name="Settings").click()
    page.fill("#p-temperature", "0")
    page.fill("#p-max_tokens", "160")
    page.locator("#p-max_tokens").dispatch_event("change")
    page.locator("#p-temperature").dispatch_event("change")
    page.get_by_role("button", name="Settings").click()
    for n, (model, text) in enumerate((("smollm2", CODE), ("smollm2-think", "What is 17 + 25?"))):
        page.get_by_label("Model", exact=True).select_option(model)
        page.fill("#ask", text)
        page.keyboard.press("Enter")
        page.locator(".turn.assistant").nth(n).get_by_text("tokens/s").wait_for()
    page.locator(".turn.assistant").last.locator("summary").click()
    photograph(page, "chat")


def compare(page: Any, server: Any) -> None:
    """One question to two models."""
    page.fill("#compare-ask", "What is 3 + 4?")
    page.fill("#compare-temperature", "0")
    page.fill("#compare-limit", "80")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("region", name="Figures").wait_for()
    photograph(page, "compare")


def bench(page: Any, server: Any) -> None:
    """A short sweep."""
    page.fill("#b-concurrency", "1,2,4")
    page.fill("#b-requests", "4")
    page.fill("#b-tokens", "12")
    page.get_by_role("button", name="Measure").click()
    page.get_by_role("button", name="Measure", disabled=False).wait_for()
    photograph(page, "bench")


def requests(page: Any, server: Any) -> None:
    """The trace of one request."""
    server.chat("smollm2", QUESTION, temperature=9)
    page.locator("tr[data-outcome=error]").wait_for()
    photograph(page, "requests")
    page.fill("#filter", "smollm2-think")
    page.locator("tbody tr").first.click()
    page.locator(".timeline").wait_for()
    photograph(page, "trace")
    page.keyboard.press("Escape")


def library(page: Any, server: Any) -> None:
    """What is on this machine."""
    page.get_by_role("heading", name="On this machine").wait_for()
    page.wait_for_timeout(1000)
    photograph(page, "library")


def photograph(page: Any, name: str) -> None:
    """The page as it is, in all schemes and on all devices."""
    FOLDER.mkdir(exist_ok=True)
    for device, (width, height) in DEVICES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(400)
            page.evaluate("document.querySelector('.scroller')?.scrollTo(0, 1e6)")  # the end of a conversation
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
                FOLDER / f"{name}-{scheme}-{device}.png", optimize=True
            )
    page.set_viewport_size(dict(zip(("width", "height"), DEVICES["desktop"], strict=True)))
    page.emulate_media(color_scheme="light")


VIEWS: dict[str, Callable[[Any, Any], None]] = {
    "overview": overview,
    "chat": chat,
    "compare": compare,
    "bench": bench,
    "requests": requests,
    "library": library,
}


def main() -> None:
    """Photograph the named views, or all."""
    servers.DEADLINE = TIMEOUT / 1000  # of its start, too, on a busy machine
    with servers.running_server() as server, running_browser() as browser:
        width, height = DEVICES["desktop"]
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(TIMEOUT)
        page.goto(server.url)
        page.locator("#link[data-state=connected]").wait_for()
        for name in sys.argv[1:] or VIEWS:
            page.goto(f"{server.url}#/{name}")
            page.locator(f"#nav-{name}[aria-current]").wait_for()
            VIEWS[name](page, server)
            print(name, flush=True)


if __name__ == "__main__":
    main()
