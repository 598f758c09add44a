"""The prefix cache over HTTP: what it has, and that it outlives the server."""

import pytest

from tools.harness.running_server import running_server


def asked(server):
    body = {"model": "talker", "messages": [{"role": "user", "content": "Say a word, please. " * 40}], "max_tokens": 5}
    return server.post("/v1/chat/completions", body).json["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def flags(scripted_path, tmp_path):
    folder = ("--prefix-cache-dir", str(tmp_path / "prefixes"), "--prefix-cache-disk-bytes", "100MB")
    return ("--no-defaults", "--model", f"talker={scripted_path}", *folder)


def test_prefixes_outlive_a_server_and_are_removed_on_demand(flags):
    with running_server(*flags) as server:
        assert asked(server) == 0
        server.stop()
    with running_server(*flags) as server:
        assert asked(server) >= 128
        usage = server.get("/v1/cache").json
        assert {(each["tier"], each["model"], each["hits"]) for each in usage["data"]} == {
            ("ram", "talker", 1),
            ("disk", "talker", 1),
        }
        assert usage["disk"]["bytes"] > 0
        cleared = server.post("/v1/cache/clear", {}).json
        assert cleared["disk"] == {"entries": 0, "bytes": 0, "hits": 1}
        assert asked(server) == 0


def test_clearing_includes_the_answer_that_has_just_ended(flags):
    with running_server(*flags) as server:
        for _ in range(10):
            assert asked(server) == 0
            cleared = server.post("/v1/cache/clear", {}).json
            assert cleared["disk"]["entries"] == 0
            assert [each["entries"] for each in cleared["data"]] == [0, 0]


def test_without_a_disk_tier_there_is_none_to_show(scripted_path):
    with running_server("--no-defaults", "--model", f"talker={scripted_path}") as server:
        asked(server)
        usage = server.get("/v1/cache").json
        assert usage["disk"] is None
        assert [each["tier"] for each in usage["data"]] == ["ram"]
