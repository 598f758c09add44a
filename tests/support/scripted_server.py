"""Scripted server: the HTTP API over a real socket, with one model per script.

Rule: `requests` holds the bodies of all requests, and `left` is set when a client hangs up on an endless stream, so
that tests wait for a condition and not for time.
"""

import asyncio
import json
import threading
from contextlib import contextmanager

from aiohttp import web

from tools.harness.running_server import DEADLINE

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 4,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
ANSWER = ("The capital", " is ", "Paris.")
CARDS = [
    {
        "id": "sleeper",
        "object": "model",
        "status": {"value": "unloaded"},
        "type": "thinking",
        "source": "org/sleeper",
        "context_length": None,
    },
    {
        "id": "talker",
        "object": "model",
        "status": {"value": "loaded"},
        "type": "instruction",
        "source": "org/talker",
        "context_length": 8192,
        "memory_bytes": 540_000_000,
        "running_requests": 1,
        "queued_requests": 2,
    },
]


def data(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(delta, reason=None):
    return data({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


END = (chunk({}, "stop"), data({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n")


def words(*texts, field="content"):
    return [chunk({field: text}) for text in texts]


def progress(*steps):
    """Progress of a load, in comments."""
    return [b": loading " + json.dumps(step).encode() + b"\n\n" for step in steps]


def call(index, **function):
    return chunk({"tool_calls": [{"index": index, "id": "call_1", "type": "function", "function": function}]})


HANG, CUT, GATE = object(), object(), object()
STEPS = [
    {"stage": "reading", "done": 1_000_000, "total": 4_000_000},
    {"stage": "warming up", "done": None, "total": None},
]

STREAMS = {
    "talker": [chunk({"role": "assistant", "content": ""}), *words(*ANSWER), *END],
    "thinker": [
        *words("17 + 25", " is 42", field="reasoning_content"),
        b": keep-alive\n\n",
        *words("42", "\n\n"),
        *END,
    ],
    "other-thinker": [*words("hm", field="reasoning"), *words("42"), *END],
    "caller": [call(0, name="add", arguments='{"a"'), call(0, arguments=": 1}"), chunk({}, "tool_calls"), *END[1:]],
    "wordy": [*words("So"), chunk({}, "length"), *END[1:]],
    "waiter": [b": loading\n\n" * 3, *words(*ANSWER), *END],
    "loader": [*progress(*STEPS), b": keep-alive\n\n", GATE, *words(*ANSWER), *END],
    "ponderous": [*progress(*STEPS), GATE, *words("Hm", field="reasoning_content"), HANG],
    "stumbler": [*progress(*STEPS), GATE, data({"error": {"message": "No weights.", "type": "server_error"}})],
    "breaker": [*words("The cap"), data({"error": {"message": "The engine stopped.", "type": "server_error"}})],
    "babbler": [b"data: {nonsense\n\n"],
    "cutter": [*words("The cap"), CUT],
    "early-leaver": words("The cap"),
    "brief": [*words("Yes"), chunk({}, "stop")],
    "smiler": [*words("é ", "🙂"), *END],
    "hanger": [*words("For"), HANG],
    "ponderer": [*words("Hm", field="reasoning_content"), HANG],
}


def step(stage, done, total):
    return data({"event": "progress", "stage": stage, "done": done, "total": total})


LOADS = {
    "org/stepwise": [
        step("downloading", 1_000_000, 4_000_000),
        b": keep-alive\n\n",
        step("downloading", 4_000_000, 4_000_000),
        step("warming", None, None),
        data({"event": "loaded", "key": "stepwise", "status": "loaded", "load_time_seconds": 2.5}),
        b"data: [DONE]\n\n",
    ],
    "org/stumbler": [
        step("reading", 1, 3),
        data({"error": {"message": "Model 'stumbler' could not be loaded: no weights.", "type": "server_error"}}),
    ],
    "org/quitter": [step("reading", 1, 3), CUT],
    "org/leaver": [step("reading", 1, 3)],
}


class ScriptedServer:
    """Server with its own event loop. has_extensions: whether load and unload exist. api_key: None for no auth."""

    def __init__(self, cards, has_extensions, api_key):
        self.cards, self.api_key = cards, api_key
        self.url, self.requests, self.left, self.gate = "", [], threading.Event(), threading.Event()
        self.app = web.Application(middlewares=[self.watch])
        self.app.router.add_get("/v1/models", self.list)
        self.app.router.add_get("/v1/models/{key:.+}", self.card)
        self.app.router.add_post("/v1/chat/completions", self.chat)
        self.app.router.add_post("/v1/embeddings", self.embed)
        if has_extensions:
            self.app.router.add_post("/v1/models/load", self.load)
            self.app.router.add_post("/v1/models/unload", self.unload)

    @web.middleware
    async def watch(self, request, handler):
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return error(401, "Incorrect API key.", type="authentication_error", code="invalid_api_key")
        return await handler(request)

    async def list(self, _):
        return web.json_response({"object": "list", "data": self.cards})

    async def card(self, request):
        key = request.match_info["key"]
        found = [card for card in self.cards if card["id"] == key]
        return web.json_response(found[0]) if found else missing(key)

    async def load(self, request):
        body = await self.received(request)
        if body.get("stream") and body["model"] in LOADS:
            return await self.play(request, LOADS[body["model"]])
        if "stream" in body:
            return error(400, "Unknown parameter 'stream'.", type="invalid_request_error", param="stream")
        if body["model"] == "org/broken":
            return error(503, "Model 'broken' could not be loaded: no weights.", type="server_error")
        key = body.get("key", "derived")
        return web.json_response({"key": key, "status": "loaded", "load_time_seconds": 1.25, "memory_bytes": 7})

    async def unload(self, request):
        key = (await self.received(request))["key"]
        if key not in [card["id"] for card in self.cards]:
            return missing(key)
        done = {"completed_requests": 3, "aborted_requests": 0, "freed_bytes": 540_000_000}
        return web.json_response({"key": key, "status": "unloaded", **done})

    async def chat(self, request):
        body = await self.received(request)
        match body["model"]:
            case "gateway":
                return web.Response(status=502, text="<html>\n<h1>Bad Gateway</h1>", content_type="text/html")
            case "string-error":
                return web.json_response({"error": "an error as a string"}, status=400)
            case "page":
                return web.Response(text="<html>hello</html>", content_type="text/html")
            case "mute":
                await self.wait_until_left()
            case "echo":
                return await self.play(request, [*words(json.dumps(body["messages"])), *END])
            case model if model not in STREAMS:
                return missing(model)
            case model if body.get("stream"):
                return await self.play(request, STREAMS[model])
        return whole(body["model"])

    async def embed(self, request):
        """A vector of two numbers per text, the last one first; a text that is "bad" is refused."""
        body = await self.received(request)
        if "bad" in body["input"]:
            return error(400, "A bad text.", type="invalid_request_error", param="input")
        entries = [{"index": n, "embedding": [n + 0.5, -1.0]} for n in range(len(body["input"]))]
        usage = {"prompt_tokens": 3 * len(entries), "total_tokens": 3 * len(entries)}
        return web.json_response({"object": "list", "data": entries[::-1], "usage": usage})

    async def received(self, request):
        body = await request.json()
        self.requests.append(body)
        return body

    async def play(self, request, script):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for step in script:
            if step is CUT:
                request.transport.abort()
            elif step is GATE:
                await asyncio.to_thread(self.gate.wait, DEADLINE)
            elif step is HANG:
                await self.wait_until_left()
            else:
                await response.write(step)
        return response

    async def wait_until_left(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


def whole(model):
    message = {"role": "assistant", "content": "".join(ANSWER)}
    if model == "thinker":
        message = {"role": "assistant", "content": "42", "reasoning_content": "17 + 25 is 42"}
    if model == "caller":
        function = {"name": "add", "arguments": '{"a": 1}'}
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "function": function}]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return web.json_response({"object": "chat.completion", "choices": [choice], "usage": USAGE})


def error(status, message, **fields):
    return web.json_response({"error": {"message": message, "param": None, "code": None, **fields}}, status=status)


def missing(key):
    message = f"Model '{key}' does not exist. Known models: sleeper, talker."
    return error(404, message, type="not_found_error", param="model", code="model_not_found")


@contextmanager
def scripted_server(*, cards=CARDS, has_extensions=True, api_key=None):
    """A ScriptedServer that runs on a free port, with its own event loop and thread."""
    server, loop, started = ScriptedServer(cards, has_extensions, api_key), asyncio.new_event_loop(), threading.Event()

    async def start():
        runner = web.AppRunner(server.app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        return runner

    def serve():
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(DEADLINE)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE)
