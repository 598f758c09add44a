"""Generator of hostile requests, from almost valid ones to no HTTP at all. Pure; one seed gives the same requests.

Rule 1: no request deserves a 5xx: nothing is downloaded, nothing is unloaded.
Rule 2: answers are short: the model has a small context.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxserver.api.endpoint import Endpoint
from mlxserver.api.endpoints import ENDPOINTS
from tools.hostile_bodies import (
    ENDLESS,
    MODEL,
    PARAMETERS,
    RESPONSE,
    SCHEMAS,
    STREAMING,
    TAKING,
    good_body,
    models_of,
    value,
    weight,
)
from tools.raw_http import request

CLOSE = "Connection: close"
PATHS = (
    *(
        endpoint.path.replace("{key}", MODEL).replace("{id}", RESPONSE)
        for endpoint in ENDPOINTS
        if endpoint not in ENDLESS
    ),
    "/v1/responses/resp_1/input_items?limit=x",
    "/v1/messages/batches",
    "/",
    "/v1/models/",
    "/v1/chat/completions/",
    "//v1/models",
    "/v1/models/%00",
    "/v1/models/%ff%fe",
    "/../../etc/passwd",
    "/v1/models/..%2f..%2fetc",
    "/v1/models?x=%zz",
    "*",
    "http://evil/health",
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW", "get")
STORE = tuple(endpoint for endpoint in ENDPOINTS if endpoint.path.startswith("/v1/responses/"))
QUERIES = (
    "",
    "?limit=x",
    "?limit=1",
    "?limit=101",
    "?order=asc",
    "?order=up",
    "?after=msg_1",
    "?stream=true",
    "?x=%zz",
)
ODD_PARAMETERS = ("no_such_parameter", "\u0000", "")
# Values as JSON text, since some are not valid JSON.
VALUES = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "17",
    "1.5",
    "1e400",
    "-1e999",
    "9" * 400,
    "0.1e-400",
    "9223372036854775808",
    "NaN",
    "Infinity",
    "-Infinity",
    "nan",
    '""',
    '"x"',
    '"\\u0000"',
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\u2028"',
    "[]",
    "{}",
    "[null]",
    "[[]]",
    "[{}]",
    '["a", 1]',
    "[1, 2, 3]",
    '[{"role": "user"}]',
    '{"a": {"b": []}}',
    '{"": ""}',
    '"' + "x" * 70_000 + '"',
    "[" * 300 + "]" * 300,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "[" * 100_000,
    "01",
    "+1",
    ".5",
    '[{"role": "user", "content": "\\u0000\\uffff"}]',
    '[{"role": "god", "content": "x"}]',
    '{"type": "json_object"}',
    '[{"role": "user", "content": [{"type": "text", "text": 5}]}]',
    '{"type": "json_schema", "json_schema": {"name": 1}}',
    '[{"role": "assistant", "content": null, "tool_calls": [{"id": 1}]}]',
    '[{"type": "function", "function": {}}]',
    '[{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}, {"type": "namespace", "name": "n"}]',
    '[{"type": "function_call", "name": "f", "arguments": "{"}, {"type": "function_call_output", "output": [5]}]',
    f'"{RESPONSE}"',
    f'[{{"type": "item_reference", "id": "{RESPONSE}"}}]',
    '[{"type": "reasoning", "summary": [5, {"text": "x"}]}, {"type": "custom_tool_call"}, {"id": "x"}]',
    '{"format": {"type": "json_schema", "schema": {"type": "string"}}}',
    '{"effort": "low", "summary": 5}',
    '{"type": "allowed_tools", "mode": "required", "tools": [{"name": []}]}',
    '[{"role": "assistant", "content": [{"type": "tool_use", "id": 1, "name": "x", "input": 5}]}]',
    '[{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]',
    '[{"type": "text", "text": "x"}]',
    '[{"name": "add", "input_schema": {"type": "object"}}, {"type": "web_search_20250305"}]',
    '{"type": "enabled", "budget_tokens": 5}',
    '{"effort": "high", "format": {"type": "json_schema", "schema": {}}}',
    '{"5": 1000}',
    '{"-1": 1}',
    '{"999999999": 1}',
    '["", ""]',
    '["' + '", "'.join("ab" * 20) + '"]',
    "'x'",
    "undefined",
    '[{"role": "user", "content": "' + "word " * 500 + '"}]',
    "[4294967296]",
    "[-1]",
    "[1.5]",
    "[" + "7," * 5000 + "7]",
    '{"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}',
)
HEADERS = (
    "Content-Type: text/plain",
    "Content-Type: \x00",
    "X-Request-Id: " + "i" * 300,
    "X-Request-Id: \xff\xfe",
    "Accept: */*",
    "Expect: 100-continue",
    "Expect: the-worst",
    "Content-Encoding: gzip",
    "Authorization: Bearer x",
    "Cookie: " + "c" * 9000,
    "Upgrade: websocket",
    "Upgrade: h2c",
    "Connection: upgrade",
    "Host: evil.example",
    "Origin: https://evil.example",
    "Origin: null",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity",
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 1e3",
    "Content-Length: " + "9" * 30,
    "Content-Length: 0x10",
    "Bad Header: x",
    ": nameless",
    "Folded: a\r\n b",
    "X: " + "y" * 70_000,
    "Range: bytes=0-1",
    "X-Forwarded-For: 1.2.3.4",
    "Keep-Alive: timeout=-1",
    "anthropic-version: 2023-06-01",
)
GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n" * 50,
    b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
    b"GET  /  HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"\x00" * 100,
    b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"{}\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\n\r\n",
    b"GET \xff HTTP/1.1\r\n\r\n",
)
CHUNKS = (
    b"zz\r\nabc\r\n",
    b"-5\r\nabc\r\n",
    b"5\r\nab\r\n0\r\n\r\n",
    b"f" * 20 + b"\r\n",
    b"3;x=" + b"y" * 9000 + b"\r\nabc\r\n",
    b"3\r\n{}}\r\n0\r\nTrailer: x\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n",
)


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes to send. is_cut: the client hangs up in the middle. methods: one per request; HEAD has no body.

    endpoint: that surely answers it, None where that is not known. target: what it was made for, in counts.
    Rule: RESPONSE in the bytes may be replaced by the id of a response that is kept.
    """

    name: str
    data: bytes
    is_cut: bool = False
    methods: tuple[str, ...] = ("POST",)
    endpoint: Endpoint | None = None
    target: str = "HTTP"


def target(endpoint: Endpoint) -> str:
    """The group of an endpoint in counts: each that generates or counts, the store of responses, and the rest."""
    if endpoint.dialect or endpoint.name == "count_tokens":
        return endpoint.name
    if endpoint in STORE:
        return "responses, store"
    return "ollama, models" if endpoint.label == "ollama" else "native"


class Hostile:
    """Generator of cases from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._kinds: tuple[tuple[Callable[[], Case], int], ...] = (
            (self.wrong_value, 45),
            (self.likely_value, 15),
            (self.broken_json, 15),
            (self.odd_request, 12),
            (self.odd_header, 8),
            (self.garbage, 4),
            (self.chunked, 3),
            (self.pipelined, 4),
            (self.cut, 4),
            (self.stored, 6),
        )

    def case(self) -> Case:
        """A case of a random kind."""
        makers, weights = zip(*self._kinds, strict=True)
        made: Case = self._random.choices(makers, weights)[0]()
        return made

    def wrong_value(self) -> Case:
        """JSON with one to three wrong or unknown parameters."""
        endpoint, body = self._body()
        fields = {name: json.dumps(value) for name, value in body.items()}
        for _ in range(self._random.randint(1, 3)):
            name = self._name(endpoint)
            fields[name] = self._value(endpoint, name)
        if self._random.random() < 0.2:
            fields.pop(self._random.choice(list(fields)))
        return self._sure("value", endpoint, _object(fields))

    def likely_value(self) -> Case:
        """A right body, and up to two values of the types that their parameters have."""
        endpoint, body = self._body()
        own = SCHEMAS[endpoint.path]["properties"]
        names = [name for name in own if name not in body]
        chosen = self._random.sample(names, min(len(names), self._random.randint(0, 2)))
        return self._sure(
            "likely", endpoint, json.dumps(body | {n: value(own[n], self._random) for n in chosen}).encode()
        )

    def broken_json(self) -> Case:
        """A valid body with some bytes changed, inserted or removed."""
        endpoint, body = self._body()
        raw = bytearray(json.dumps(body).encode())
        for _ in range(self._random.randint(1, 4)):
            position = self._random.randrange(len(raw) + 1)
            raw[position : position + self._random.randint(0, 3)] = self._random.randbytes(self._random.randint(0, 3))
        return self._sure("json", endpoint, bytes(raw))

    def stored(self) -> Case:
        """A request for a response that may be kept."""
        endpoint = self._random.choice(STORE)
        id = RESPONSE if self._random.random() < 0.8 else self._random.choice(("resp_1", "%00", "msg_1", "x" * 300))
        path = endpoint.path.replace("{id}", id) + self._random.choice(QUERIES)
        data = request(endpoint.method, path, b"", CLOSE)
        return Case(f"{endpoint.method} {path[:60]}", data, False, (endpoint.method,), endpoint, target(endpoint))

    def odd_request(self) -> Case:
        """A random method on a random path."""
        method, path = self._random.choice(METHODS), self._random.choice(PATHS)
        if self._random.random() < 0.2:
            path = "/" + "".join(
                chr(self._random.randrange(33, 255)) for _ in range(self._random.choice((5, 50, 9000)))
            )
        body = self._random.choice((b"", b"{}", b"[]", b"null", b"\xff", b'"x"'))
        return Case(f"{method} {path[:40]}", request(method, path, body, CLOSE), methods=(method,))

    def odd_header(self) -> Case:
        """A valid request with wrong headers."""
        endpoint, body = self._body()
        headers = self._random.sample(HEADERS, self._random.randint(1, 3))
        if self._random.random() < 0.1:
            headers += [f"H{n}: v" for n in range(3000)]
        data = request(endpoint.method, endpoint.path, json.dumps(body).encode(), CLOSE, *headers)
        return Case(f"headers {headers}"[:80], data, target=target(endpoint))

    def garbage(self) -> Case:
        """Bytes that are no HTTP."""
        data = self._random.choice((*GARBAGE, self._random.randbytes(self._random.randint(1, 300))))
        return Case(f"garbage {data[:30]!r}", data + b"\r\n\r\n")

    def chunked(self) -> Case:
        """A body of invalid chunks."""
        endpoint, _ = self._body()
        head = f"{endpoint.method} {endpoint.path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        chunks = b"".join(self._random.choices(CHUNKS, k=self._random.randint(1, 3)))
        return Case("chunks", f"{head}{CLOSE}\r\n\r\n".encode() + chunks, target=target(endpoint))

    def pipelined(self) -> Case:
        """Several requests before the first answer."""
        cases = []
        for _ in range(self._random.randint(2, 6)):
            endpoint, body = self._body()
            asked = (endpoint.method, endpoint.path, json.dumps(body).encode())
            cases.append(asked if self._random.random() < 0.5 else ("GET", "/health", b""))
        last = len(cases) - 1
        data = b"".join(request(*case, *([CLOSE] if n == last else [])) for n, case in enumerate(cases))
        if self._random.random() < 0.3:
            data += self._random.choice(GARBAGE)
        return Case("pipelined", data, methods=tuple(method for method, _, _ in cases))

    def cut(self) -> Case:
        """A client that hangs up within its request."""
        whole = self._random.choice((self.wrong_value, self.odd_header, self.chunked))()
        return Case("cut", whole.data[: self._random.randrange(len(whole.data))], is_cut=True, target=whole.target)

    def _sure(self, name: str, endpoint: Endpoint, body: bytes) -> Case:
        data = request(endpoint.method, endpoint.path, body, CLOSE)
        return Case(f"{name} {endpoint.path}", data, endpoint=endpoint, target=target(endpoint))

    def _body(self) -> tuple[Endpoint, dict[str, Any]]:
        endpoint = self._random.choices(TAKING, weights=[weight(each) for each in TAKING])[0]
        streams = endpoint.path in STREAMING and self._random.random() < 0.3
        body = good_body(endpoint, self._random.choice(models_of(endpoint)))
        return endpoint, body | ({"stream": True} if streams else {})

    def _name(self, endpoint: Endpoint) -> str:
        """A parameter of this endpoint, or of any, or of none."""
        own = [*SCHEMAS[endpoint.path]["properties"]]
        chosen: str = self._random.choice(own if self._random.random() < 0.6 else [*PARAMETERS, *ODD_PARAMETERS])
        return chosen

    def _value(self, endpoint: Endpoint, name: str) -> str:
        """JSON, or nearly: a hostile value, or one that is like what the parameter takes."""
        schema = SCHEMAS[endpoint.path]["properties"].get(name)
        if schema and self._random.random() < 0.4:
            return json.dumps(value(schema, self._random))
        return self._random.choice(VALUES)


def _object(fields: dict[str, str]) -> bytes:
    text = ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items())
    return ("{" + text + "}").encode("utf-8", "surrogatepass")
