"""A stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import hashlib
import json
import math
import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import huggingface_hub

from mlxserver.engine.loading.download import transfer

COMMIT = "c" * 40
TOKEN = "hf_right"
PIECE = 16_384  # bytes that are sent at once
LARGE = 50_000  # bytes of a file from which on it can be cut, slow, or wrong


def is_lfs(name):
    return name.endswith((".safetensors", ".gguf"))


def digest(name, body):
    """The digest that the hub states: SHA-256 of what is in LFS, git's of the rest."""
    return (
        hashlib.sha256(body).hexdigest() if is_lfs(name) else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    )


class Hub(BaseHTTPRequestHandler):
    """Repositories that have the same files; org/private has them for a token alone. server: has files and faults."""

    def do_GET(self):
        url = urlsplit(self.path)  # a whole one, where it is asked as a proxy
        self.server.asked.append((self.command, url.path, self.headers.get("Range")))
        path = url.path
        if "/org/gated" in path:
            self.reply(b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif "/org/private" in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(b"", 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/org/busy" in path:
            self.reply(b"", 503)
        elif path == "/api/models":
            self.search(parse_qs(url.query))
        elif path.startswith("/api/models/"):
            self.list_files(path.removeprefix("/api/models/"), parse_qs(url.query))
        elif path.startswith("/cdn/"):
            self.server.shown_to_cdn.add(self.headers.get("Authorization"))
            self.send_part(path.rsplit("/", 1)[1])
        elif "/resolve/" in path:
            self.resolve(path.strip("/"))
        else:
            self.reply(b"", 401, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def search(self, query):
        words = query.get("search", [""])[0].lower().split()
        found = [each for each in self.server.listed if all(word in each["id"].lower() for word in words)]
        self.reply(json.dumps(found[: int(query.get("limit", ["100"])[0])]).encode())

    def list_files(self, path, query):
        repository = "/".join(path.split("/")[:2])
        if repository not in self.server.repositories:
            return self.reply(b"", 401, {"X-Error-Code": "RepoNotFound"})
        if path.split("/")[2:3] == ["revision"] and path.split("/")[3] not in ("main", self.server.commit):
            return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        return self.reply(
            json.dumps({"id": repository, "sha": self.server.commit, "siblings": self.siblings(query)}).encode()
        )

    def siblings(self, query):
        if "blobs" not in query or self.server.is_mirror:
            return [{"rfilename": name} for name in self.server.files]
        return [
            {"rfilename": name, "size": len(body), "blobId": digest(name, body)}
            | ({"lfs": {"sha256": digest(name, body), "size": len(body), "pointerSize": 134}} if is_lfs(name) else {})
            for name, body in self.server.files.items()
        ]

    def resolve(self, path):
        """A small file; of one in LFS its digest, and where it is."""
        name = path.split("/", 4)[4]
        if name not in self.server.files:
            return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        if not is_lfs(name):
            return self.send_part(name)
        body = self.server.files[name]
        linked = {"X-Linked-Etag": f'"{digest(name, body)}"', "X-Linked-Size": len(body)}
        return self.reply(b"", 302, {**linked, "Location": f"{self.server.address}/cdn/{name}"})

    def send_part(self, name):
        """The file, or the range of it that is asked for."""
        body = self.server.files[name]
        if len(body) > LARGE and self.server.answers:
            return self.reply(b"", *self.server.answers.pop(0))
        etag = {"ETag": f'"{digest(name, body)}"'}
        if len(body) > LARGE and self.server.wrong and self.command == "GET":
            self.server.wrong -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = self.headers.get("Range")
        if len(body) > LARGE and self.server.excess and self.command == "GET":
            body = body + bytes(self.server.excess) if self.server.excess > 0 else body[: self.server.excess]
        if not asked or self.server.ignores_ranges:
            return self.reply(body, headers=etag)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), int(last or len(body) - 1) + 1
        content_range = f"bytes {begin}-{end - 1}/{len(body)}"
        return self.reply(body[begin:end], 206, {**etag, "Content-Range": content_range})

    def reply(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.server.commit, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.send_body(body)

    def send_body(self, body):
        if len(body) > LARGE and self.server.interrupts:
            self.server.interrupts = False
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the signal is handled on another thread, before the download ends
        is_cut = len(body) > LARGE and self.server.cuts > 0
        self.server.cuts -= is_cut
        for begin in range(0, len(body) // 2 if is_cut else len(body), PIECE):
            while len(body) > LARGE and self.server.sent >= self.server.most:
                time.sleep(0.01)
            self.wfile.write(body[begin : begin + PIECE])
            self.server.sent += min(PIECE, len(body) - begin)
            if len(body) > LARGE and self.server.delay:
                self.wfile.flush()
                time.sleep(self.server.delay)
        self.close_connection = True

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, address):
        """Clients hang up; that is what some tests are about."""


@contextmanager
def hub_of(files):
    """The hub with the files of org/tiny, by name. Its attributes are the faults of what is asked next.

    most: bytes that it has sent when it holds large files up, until that is raised.
    """
    server = _Server(("127.0.0.1", 0), Hub)
    server.files, server.cuts, server.wrong, server.delay, server.sent, server.excess = files, 0, 0, 0.0, 0, 0
    server.interrupts = server.ignores_ranges = server.is_mirror = False
    server.most = math.inf
    server.commit, server.repositories = COMMIT, {"org/tiny", "org/private"}
    server.shown_to_cdn = set()
    server.answers, server.asked, server.listed = [], [], []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.most = math.inf
    server.shutdown()
    server.server_close()


@contextmanager
def serving_hub(files, cache, monkeypatch):
    """The hub that huggingface_hub asks in this process, with its cache."""
    with hub_of(files) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(transfer, "DELAYS", (0.01,) * 5)
        yield server
