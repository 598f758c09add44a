"""A stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import hashlib
import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, org/tiny. server: has its files, and the faults of the next downloads."""

    def do_GET(self):
        path, files = self.path.split("?")[0], self.server.files
        if "/org/private" in path:
            self.reply(b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif "/org/busy" in path:
            self.reply(b"", 503)
        elif path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
            self.reply(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in files.items()]
            self.reply(json.dumps(tree).encode())
        elif path.startswith("/org/tiny/resolve/"):
            self.send_part(files[path.rsplit("/", 1)[1]])
        else:
            self.reply(b"", 401, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_part(self, body):
        etag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        if not (asked := self.headers.get("Range")):
            return self.reply(body, headers=etag)
        begin = int(asked.removeprefix("bytes=").partition("-")[0])
        content_range = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        return self.reply(body[begin:], 206, {**etag, "Content-Range": content_range})

    def reply(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            if len(body) > 50_000 and self.server.interrupts:
                self.server.interrupts = False
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)  # the signal is handled on another thread, before the download ends
            is_cut = len(body) > 50_000 and self.server.cuts > 0
            self.server.cuts -= is_cut
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            self.close_connection = True

    def log_message(self, *args):
        pass


@contextmanager
def serving_hub(files, cache, monkeypatch):
    """The hub with the files of org/tiny, by name, that huggingface_hub asks, and its cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cuts, server.interrupts = files, 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    yield server
    server.shutdown()
    server.server_close()
