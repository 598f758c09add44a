"""Downloads from a stand-in for the Hugging Face hub that speaks its HTTP protocol, and fails as it does."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from mlxserver.engine.errors import LoadAborted
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.download import transfer
from mlxserver.engine.loading.download.download import fetch_now, list_files
from mlxserver.engine.loading.errors import DiskFull, HubUnavailable, SourceInvalid
from tests.support.hub import TOKEN, digest, hub_of, serving_hub
from tools.harness.running_server import eventually

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
SECOND = "model-2.safetensors"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"# tiny",
    WEIGHTS: random.Random(1).randbytes(300_000),
    SECOND: random.Random(2).randbytes(200_000),
}
WANTED = {name: body for name, body in FILES.items() if name != "README.md"}
Space = namedtuple("Space", "total used free")
ELSEWHERE = """
import sys
from mlxserver.engine.loading.download.download import Download, list_files
print(Download(list_files(sys.argv[1], None)).run(lambda *step: None))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving_hub(FILES, tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub" / "models--org--tiny"


def download(progress=lambda *step: None, source="org/tiny"):
    return sources.resolve(source, progress=progress)


class Claimed(bytes):
    """A file of which the hub states a size that it does not send."""

    size = 60 * 10**9

    def __len__(self):
        return self.size


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def begun(cache, name, length, flip=False):
    """The beginning of a file, as a process that was killed leaves it."""
    path = cache / "blobs" / f"{digest(name, FILES[name])}.incomplete"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(FILES[name][:length] if not flip else b"\0" * length)
    return path


def ranges(hub, name=WEIGHTS):
    return [asked for method, path, asked in hub.asked if path == f"/cdn/{name}" and method == "GET"]


def test_the_layout_is_that_of_the_hubs_cache(hub, cache):
    directory = download()
    assert content(directory) == WANTED
    assert directory == cache / "snapshots" / hub.commit
    assert {path.name for path in (cache / "blobs").iterdir()} == {digest(*each) for each in WANTED.items()}
    assert all(path.readlink().parts[:3] == ("..", "..", "blobs") for path in directory.iterdir())
    assert (cache / "refs" / "main").read_text() == hub.commit


def test_what_is_there_is_not_fetched_again(hub, cache):
    begun(cache, WEIGHTS, 123_456)
    seen = []
    assert content(download(lambda *step: seen.append(step))) == WANTED
    assert ranges(hub) == ["bytes=123456-"]
    assert seen[0][1] >= 123_456
    hub.asked.clear()
    download()
    assert [path for _, path, _ in hub.asked if "resolve" in path or "cdn" in path] == []


@pytest.mark.parametrize(
    ("length", "flip"), [(299_999, True), (300_000, False), (300_000, True), (400_000, True), (0, 0)]
)
def test_any_beginning_leads_to_the_right_file(hub, cache, length, flip):
    begun(cache, WEIGHTS, length, flip)
    assert content(download()) == WANTED


@pytest.mark.parametrize("length", [0, 50_000])
def test_a_long_file_comes_in_several_answers(hub, cache, monkeypatch, length):
    """Content delivery networks send no answer of more than 50 GB."""
    monkeypatch.setattr(transfer, "LONGEST_ANSWER", 120_000)
    begun(cache, WEIGHTS, length)
    assert content(download()) == WANTED
    begins = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges(hub)]
    assert begins == [length, length + 120_000, length + 240_000]


def test_a_long_file_of_a_server_without_ranges_comes_in_one(hub, cache, monkeypatch):
    monkeypatch.setattr(transfer, "LONGEST_ANSWER", 120_000)
    hub.ignores_ranges = True
    assert content(download()) == WANTED
    assert ranges(hub) == ["bytes=0-119999"]


def test_sizes_above_50_gb_are_counted_and_gone_on_from(hub, cache):
    hub.files = {**FILES, WEIGHTS: Claimed(FILES[WEIGHTS])}
    with begun(cache, WEIGHTS, 0).open("r+b") as part:
        part.truncate(Claimed.size - 100_000)  # takes no room on the disk
    seen = []
    with pytest.raises(HubUnavailable):
        download(lambda *step: seen.append(step))
    assert {*ranges(hub)} == {f"bytes={Claimed.size - 100_000}-"}
    assert max(done for _, done, _ in seen) >= Claimed.size - 100_000
    assert {total for _, _, total in seen} == {Claimed.size + sum(map(len, WANTED.values())) - 300_000}


def test_a_file_that_is_larger_than_the_disk_is_not_begun(hub, monkeypatch):
    monkeypatch.setattr(Claimed, "size", 60 * 10**15)
    hub.files = {**FILES, WEIGHTS: Claimed(FILES[WEIGHTS])}
    with pytest.raises(DiskFull, match=r"60\.0 PB do not fit on the disk of .*, [\d.]+ [MGT]B free"):
        download()
    assert ranges(hub) == []


def test_a_check_of_a_long_file_can_be_stopped_and_shows(hub, monkeypatch):
    monkeypatch.setattr(transfer, "DIGESTED", 1000)
    seen, checks = set(), []

    def check(reason, seconds):
        seen.add(reason)
        checks.append(reason)
        if reason and len(checks) > 100:
            raise transfer.Stopped

    manifest = list_files("org/tiny", None)
    with pytest.raises(transfer.Stopped):
        transfer.fetch(manifest, manifest.find(WEIGHTS), check)
    assert seen == {"", "the digest of what has arrived is being checked"}
    assert not manifest.has(manifest.find(WEIGHTS))
    assert content(download()) == WANTED


def test_a_server_without_ranges_sends_all_of_it(hub, cache):
    begun(cache, WEIGHTS, 100_000)
    hub.ignores_ranges = True
    assert content(download()) == WANTED


def test_a_server_that_sends_too_much_fills_no_disk(hub, cache):
    """The rest is not read: the file is right, and its end is known."""
    hub.excess = 40_000
    assert content(download()) == WANTED


def test_a_server_that_sends_too_little_is_not_asked_for_ever(hub, cache):
    hub.excess = -1
    with pytest.raises(HubUnavailable):
        download()
    assert len(ranges(hub)) <= 2 * len(transfer.DELAYS)
    assert not (cache / "snapshots").exists()
    hub.excess = 0
    assert content(download()) == WANTED


@pytest.mark.parametrize("commit", ["../../../../outside", "/outside", ".", ""])
def test_a_commit_that_is_no_name_makes_no_folder(hub, cache, tmp_path, commit):
    hub.commit = commit
    with pytest.raises(HubUnavailable, match="as the commit of org/tiny"):
        download()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("revision", ["/etc/x", "../x", "a/../../x", "-x", ""])
def test_a_revision_that_is_a_path_is_no_source(hub, revision):
    with pytest.raises(SourceInvalid, match="expected"):
        download(source=f"org/tiny@{revision}")
    assert not hub.asked


def test_a_connection_that_is_cut_is_gone_on_from(hub):
    hub.cuts = 3
    assert content(download()) == WANTED
    assert [asked for name in (WEIGHTS, SECOND) for asked in ranges(hub, name) if asked]


@pytest.mark.parametrize(
    "answer", [(429, {"Retry-After": "0.02"}), (429, {"Retry-After": "soon"}), (503, {}), (500, {})]
)
def test_a_busy_hub_is_asked_again(hub, answer):
    hub.answers = [answer] * 4
    seen = []
    assert content(download(lambda *step: seen.append(step))) == WANTED


def test_a_small_file_is_not_waited_for_as_long_as_a_hub_asks(hub):
    hub.answers = [(429, {"Retry-After": "300"})] * 2
    manifest = list_files("org/tiny", None)
    file = manifest.find(WEIGHTS)
    began = time.monotonic()
    assert fetch_now(manifest, file).read_bytes() == FILES[WEIGHTS]
    assert time.monotonic() - began < 60


def test_what_a_download_waits_for_is_its_stage(hub):
    hub.answers = [(429, {"Retry-After": "1.4"})] * 2
    stages = []
    download(lambda stage, *_: stages.append(stage))
    assert {*stages} == {"downloading", "waiting: the hub answered with status 429; next try in 1 s"}


def test_a_hub_that_stays_busy_is_named_and_what_has_arrived_stays(hub, cache):
    part = begun(cache, WEIGHTS, 100_000)
    hub.answers = [(503, {})] * 40
    with pytest.raises(HubUnavailable, match="status 503. What has arrived stays"):
        download()
    assert part.stat().st_size == 100_000
    assert not (cache / "snapshots").exists()
    hub.answers = []
    assert content(download()) == WANTED


def test_a_wrong_digest_is_fetched_again_once(hub):
    hub.wrong = 1
    assert content(download()) == WANTED


def test_a_file_that_stays_wrong_is_not_kept(hub, cache):
    hub.wrong = 20
    with pytest.raises(HubUnavailable, match="wrong digest twice"):
        download()
    assert not (cache / "snapshots").exists()
    assert not (cache / "blobs" / digest(WEIGHTS, FILES[WEIGHTS])).exists()


def test_a_mirror_that_lists_names_alone_states_digests_when_asked(hub):
    hub.is_mirror = True
    assert content(download()) == WANTED


def test_a_model_stays_what_it_was_until_its_update_is_complete(hub, cache):
    before = download()
    hub.commit, hub.files = "d" * 40, {**FILES, WEIGHTS: FILES[WEIGHTS][::-1]}
    hub.answers = [(503, {})] * 40
    with pytest.raises(HubUnavailable):
        download()
    assert (cache / "refs" / "main").read_text() == before.name
    assert content(before) == WANTED
    hub.answers = []
    after = download()
    assert (after.name, (cache / "refs" / "main").read_text()) == ("d" * 40, "d" * 40)
    assert content(before) == WANTED


def test_a_stopped_download_leaves_no_model(hub, cache):
    hub.delay = 0.05

    def stop_at(stage, done, total):
        if done > 100_000:
            raise LoadAborted("org/tiny")

    with pytest.raises(LoadAborted):
        download(stop_at)
    assert not (cache / "snapshots").exists()
    assert sum(path.stat().st_size for path in (cache / "blobs").iterdir()) > 100_000
    hub.delay, hub.sent = 0.0, 0
    assert content(download()) == WANTED
    assert hub.sent < 450_000


def test_a_disk_without_room_is_named_before_the_first_byte(hub, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Space(10**10, 9 * 10**9, 10**9))
    with pytest.raises(DiskFull, match=r"500.0 kB do not fit on the disk of .*, 1.0 GB free"):
        download()
    assert ranges(hub) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_becomes_full_is_named(hub, cache):
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / f"{digest(WEIGHTS, FILES[WEIGHTS])}.incomplete").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="is full. What has arrived stays"):
        download()


def test_a_copy_from_before_is_used_where_the_hub_fails_and_the_log_says_so(hub, caplog):
    before = download()
    hub.shutdown()
    hub.server_close()
    assert download() == before
    assert "the copy from before is used" in caplog.text


def test_no_network(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubUnavailable, match=f"\\({hub.address}\\); expected a network connection, or a copy"):
        download()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE is set"):
        download()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("org/missing", "no such repository on the hub"),
        ("org/private", "or a private one: set HF_TOKEN"),
        ("org/gated", "access is restricted"),
        ("org/tiny@v9", "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_named(hub, source, reason):
    with pytest.raises(SourceInvalid, match=reason):
        download(source=source)


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A hub, and downloads from it in processes of their own."""
    with hub_of(FILES) as server:
        running = []

        def start(repository="org/tiny", **variables):
            own = {"HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
            kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
            process = subprocess.Popen(
                [sys.executable, "-c", ELSEWHERE, repository],
                env=kept | own | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            running.append(process)
            return process

        yield server, start
        for process in running:
            process.kill()
            process.communicate()


def test_a_download_goes_on_after_kill_9(elsewhere, cache):
    hub, start = elsewhere
    hub.most = 150_000  # less than either file
    process = start()
    eventually(lambda: hub.sent >= hub.most and _on_disk(cache) > 100_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache / "snapshots").exists()
    hub.most, before = math.inf, hub.sent
    out, err = start().communicate(timeout=60)
    directory = Path(out.strip())
    assert content(directory) == FILES, err
    assert hub.sent - before < 400_000
    assert any(ranges(hub) + ranges(hub, SECOND))


def _on_disk(cache):
    return sum(path.stat().st_size for path in (cache / "blobs").iterdir())


def test_two_processes_fetch_each_file_once(elsewhere):
    hub, start = elsewhere
    hub.delay = 0.02
    outcomes = [process.communicate(timeout=60) for process in (start(), start())]
    assert {out for out, _ in outcomes} == {outcomes[0][0]}
    assert content(Path(outcomes[0][0].strip())) == FILES
    assert len(ranges(hub)) == 1


def test_the_token_and_the_proxy_of_the_environment_are_used(elsewhere):
    hub, start = elsewhere
    refused = start("org/private").communicate(timeout=60)
    assert "Repository Not Found" in refused[1]
    endpoint, hub.address = hub.address, f"http://localhost:{hub.server_port}"  # LFS files have another origin
    out, err = start("org/private", HF_TOKEN=TOKEN, HF_ENDPOINT=endpoint).communicate(timeout=60)
    assert content(Path(out.strip())) == FILES, err
    assert hub.shown_to_cdn == {None}
    hub.address = "http://hub.invalid"
    out, err = start(HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=f"http://127.0.0.1:{hub.server_port}").communicate(
        timeout=60
    )
    assert content(Path(out.strip())) == FILES, err
