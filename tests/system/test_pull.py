"""Downloads from a stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple

import pytest

from mlx_api_server import read_settings
from mlxserver.cli.command import main
from mlxserver.engine.platform.native.extension import native
from tests.support.hub import COMMIT, serving_hub
from tools.harness.models import tiny_llama
from tools.harness.running_server import ROOT, server_environment

LISTED = [
    {
        "id": "mlx-community/Tiny-4bit",
        "downloads": 12_345,
        "likes": 3,
        "lastModified": "2026-05-01T10:00:00.000Z",
        "tags": ["mlx", "4-bit"],
        "config": {"model_type": "llama", "quantization_config": {"bits": 4}},
        "safetensors": {"parameters": {"U32": 1_250_000, "BF16": 80_000}, "total": 1_330_000},
    },
    {"id": "mlx-community/Tiny-bare", "downloads": 7, "likes": 0, "gated": "manual"},
]
Space = namedtuple("Space", "total used free")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"run.py": b"print()"}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # no server
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
    assert "no server at http://127.0.0.1:9/v1" in err
    assert re.search(r"org/tiny: [\d.]+ kB to download; it needs [\d.]+ MB of memory, which is there", err)
    assert pulled["fits"]
    assert pull("org/tiny") == 0
    assert "org/tiny: nothing to download" in capfd.readouterr().err


def test_progress_is_lines_where_there_is_no_terminal(hub, monkeypatch, capfd):
    monkeypatch.setattr("mlxserver.cli.pull.INTERVAL", 0.0)
    hub.delay = 0.02
    assert pull("org/tiny") == 0
    assert re.search(r"^[\d.]+ kB of [\d.]+ kB$", capfd.readouterr().err, re.MULTILINE)


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
        ("org/busy", "which answered with status 503; try again later"),
        ("./here", "expected the id of a Hugging Face repository"),
        ("tiny", "such as org/name (search finds some)"),
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
    assert "and models may take 1.0 kB (it can be downloaded with force)" in capfd.readouterr().err
    assert [*(tmp_path / "hub").glob("models--org--tiny/snapshots/*/model.safetensors")] == []
    assert pull("org/tiny", "--force") == 0


def test_the_address_of_a_page_is_a_name(hub, capfd):
    assert pull("https://huggingface.co/org/tiny") == 0


def test_a_model_that_can_not_be_loaded_is_downloaded_with_force_alone(hub, files, capfd):
    hub.files = {**files, "config.json": b'{"model_type": "frobnicator"}'}
    assert pull("org/tiny") == 1
    assert "frobnicator" in capfd.readouterr().err
    assert pull("org/tiny", "--force") == 0
    assert "what it needs of memory is not known" in capfd.readouterr().err


def test_models_of_the_hub_are_found(hub, capfd):
    memory = "273.6 MB" if native() else "308.8 MB"  # its weights as they are stored, or dequantised
    hub.listed = LISTED
    assert main(["search", "tiny"], read_settings) == 0
    out, err = capfd.readouterr()
    assert [line.split("\t") for line in out.splitlines()] == [
        ["mlx-community/Tiny-4bit", "4-bit", "10.1M", "5.2 MB", memory, "now", "12.3k", "-"],
        ["mlx-community/Tiny-bare", "-", "-", "-", "-", "-", "7", "terms to accept"],
    ]
    assert err.splitlines()[-1] == "Download one with: mlx-server pull mlx-community/Tiny-4bit"
    assert main(["search", "nothing"], read_settings) == 1
    assert main(["search", "tiny", "--json", "--limit", "1"], read_settings) == 0


def test_a_search_without_a_network_is_one_line_at_once(hub, monkeypatch, capfd):
    hub.shutdown()
    hub.server_close()
    assert main(["search", "tiny"], read_settings) == 1
    line = f"error: Search for 'tiny': the Hugging Face hub ({hub.address}) can't be reached"
    assert capfd.readouterr().err.splitlines() == [line]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["search", "tiny"], read_settings) == 1
    assert capfd.readouterr().err.splitlines() == [f"{line} (HF_HUB_OFFLINE is set)"]


def test_a_pull_without_a_network_takes_the_copy_and_says_so_once(hub, monkeypatch, caplog):
    assert pull("org/tiny") == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pull("org/tiny") == 0
    line = "org/tiny: the hub can't be asked (HF_HUB_OFFLINE is set); the copy from before is used"
    assert [record.getMessage() for record in caplog.records if record.name == "models"] == [line]


def test_ctrl_c_ends_a_pull_whose_hub_answers_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_CACHE": str(tmp_path)}
        own |= {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
        command = [sys.executable, str(ROOT / "mlx_api_server.py"), "pull", "org/tiny"]
        pulling = subprocess.Popen(command, env=server_environment() | own, stderr=subprocess.PIPE, text=True)
        silent.settimeout(60)
        with silent.accept()[0]:
            pulling.send_signal(signal.SIGINT)
            _, err = pulling.communicate(timeout=60)
    assert (pulling.returncode, len(err.splitlines())) == (130, 1)
