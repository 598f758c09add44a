"""Downloads from a stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from tools.harness.models import tiny_llama

COMMIT = "c" * 40
Space = namedtuple("Space", "total used free")


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"run.py": b"print()"}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.cuts, server.interrupts = files, 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def pull(*arguments):
    return main(["pull", *arguments], read_settings)


def test_a_repository_is_downloaded_once_and_without_its_code(hub, files, tmp_path, capfd):
    assert pull("org/tiny", "--json") == 0
    out, err = capfd.readouterr()
    pulled = json.loads(out)
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert pulled["path"] == str(snapshot)
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == {
        name: body for name, body in files.items() if name != "run.py"
    }
    assert "to download; needs" in err
    assert pull("org/tiny") == 0
    assert "org/tiny: 0 bytes to download" in capfd.readouterr().err


def test_a_cut_connection_is_no_failure(hub, files, tmp_path):
    hub.cuts = 1
    assert pull("org/tiny") == 0
    (path,) = (tmp_path / "hub").glob("models--org--tiny/snapshots/*/model.safetensors")
    assert path.read_bytes() == files["model.safetensors"]


def test_ctrl_c_stops_a_download_and_the_next_one_completes_it(hub, tmp_path, capfd):
    hub.interrupts = True
    assert pull("org/tiny") == 130
    assert "Stopped." in capfd.readouterr().err
    assert not list((tmp_path / "hub").glob("models--org--tiny/snapshots/*/model.safetensors"))
    assert pull("org/tiny") == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/missing", "no such repository on the hub"),
        ("org/private", "access is restricted"),
        ("org/busy", "could not be fetched"),
        ("./here", "no such file"),
    ],
)
def test_what_can_not_be_had_is_named(hub, name, reason, capfd):
    assert pull(name) == 1
    assert reason in capfd.readouterr().err


def test_no_room_on_the_disk_or_in_memory_is_said_before_the_download(hub, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Space(10**10, 9 * 10**9, 10**9))
        assert pull("org/tiny") == 1
    assert "do not fit on the disk" in capfd.readouterr().err
    monkeypatch.setenv("MLX_SERVER_MEMORY_LIMIT", "1000")
    assert pull("org/tiny") == 1
    assert "--force downloads it" in capfd.readouterr().err
    assert [*(tmp_path / "hub").glob("models--org--tiny/snapshots/*/model.safetensors")] == []
    assert pull("org/tiny", "--force") == 0
