"""Downloads from a stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import json
import shutil
from collections import namedtuple

import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from tests.support.hub import COMMIT, serving_hub
from tools.harness.models import tiny_llama

Space = namedtuple("Space", "total used free")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"run.py": b"print()"}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    with serving_hub(files, tmp_path / "hub", monkeypatch) as server:
        yield server


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
        ("org/gated", "access is restricted"),
        ("org/private", "or a private one: set HF_TOKEN"),
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
