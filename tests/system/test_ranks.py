"""Models that ranks share: messages, answers, and the loss of a rank. Real processes, MLX's ring."""

import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxserver.engine.mlx import mx

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.api.native.load import LoadRequest
from mlxserver.api.schema.parameters import ValidationFailed, parse
from mlxserver.config.sampling_params import SamplingParams
from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.distributed.codec import (
    RemoteConstraint,
    answer,
    decode_mask,
    decode_sequences,
    decode_tokens,
    encode_sequences,
    encode_tokens,
)
from mlxserver.engine.distributed.launch import RanksDiffer, compare, shared_facts
from mlxserver.engine.distributed.link import Link, LinkLost
from mlxserver.engine.distributed.loads import Loads
from mlxserver.engine.distributed.membership import Follower, stalled
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import estimate, loader
from mlxserver.engine.loading.sharding import RankPosition, divider, share
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.sequence import Logprobs, SampledToken, Sequence
from tools.harness.models import ROOM, tiny_llama
from tools.harness.ranks import end, running_ranks, start_ranks, tiny_qwen
from tools.harness.running_server import DEADLINE, eventually

AT_ONCE = 8
LIKE = {"tensor": "llama", "pipeline": "qwen"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    tiny_llama(directory / "llama", context=ROOM)
    tiny_qwen(directory / "qwen", layers=3)
    sections = {
        "tensor": f'source = "{directory}/llama"\nshard = "tensor"\npreload = true',
        "pipeline": f'source = "{directory}/qwen"\nshard = "pipeline"\npreload = true',
        "llama": f'source = "{directory}/llama"',
        "qwen": f'source = "{directory}/qwen"',
        "impossible": f'source = "{directory}/llama"\nshard = "pipeline"',
    }
    text = "".join(f"[models.{key}]\n{section}\n" for key, section in sections.items())
    (directory / "settings.toml").write_text(text)
    pair = "".join(f"[models.{key}]\n{sections[key]}\n" for key in ("tensor", "llama"))
    (directory / "silent.toml").write_text(f"rank_timeout = 5\n{pair}")
    (directory / "watched.toml").write_text(f"wedged_after = 5\nrank_timeout = 20\n{pair}")
    (directory / "small.toml").write_text(f'memory_limit = "2GB"\nrank_timeout = 20\n{pair}')
    (directory / "other.toml").write_text(text.replace('"tensor"\n', '"tensor"\nmax_running = 3\n'))
    return directory / "settings.toml"


def test_two_ranks_generate_what_one_process_does_and_a_lost_rank_ends_what_it_shared(settings):
    """One start of the processes for all of it: that is what takes the time."""
    with running_ranks(settings) as ranks:
        server = ranks.server
        leaving = threading.Thread(target=hang_up, args=(server, 6))
        leaving.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            cases = [(key, number) for number in range(8) for key in LIKE]
            assert all(pool.map(lambda case: said(server, *case) == said(server, LIKE[case[0]], case[1]), cases))
        leaving.join()
        check_what_a_single_process_promises(server)
        check_a_load_that_fails(server)
        assert [rank["status"] for rank in server.get("/health").json["ranks"]] == ["ok", "ok"]
        check_a_lost_rank(ranks)


def said(server, key, number):
    """Odd numbers are seeded."""
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 2 else {"temperature": 0}
    answer = server.chat(key, f"{number} " * (1 + 5 * number), max_tokens=12, logprobs=True, **sampling).json
    return [token["bytes"] for token in answer["choices"][0]["logprobs"]["content"]]


def scores(server, key, text):
    scored = server.chat(key, text, max_tokens=1, prompt_logprobs=0).json["prompt_logprobs"]
    return [score["logprob"] for token in scored[1:] for score in token.values()]


def hang_up(server, times):
    for number in range(times):
        with server.stream(list(LIKE)[number % 2], "Hello", max_tokens=400, temperature=0) as stream:
            stream.read(2 + number % 3)


def check_what_a_single_process_promises(server):
    """Prefixes, grammars, biases and several choices, through ranks."""
    long = "One two three four five six seven eight nine ten. " * 4
    first, second = (server.chat("tensor", long, max_tokens=2).json["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] > 0 == first["prompt_tokens_details"]["cached_tokens"]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    made = server.chat("tensor", "Hello", max_tokens=40, response_format=form).message["content"]
    assert json.loads(made)["a"] in (1, 2)
    biased = server.chat("pipeline", "Hello", max_tokens=3, n=2, logit_bias={"70": 100}).json
    (token,) = {choice["message"]["content"] for choice in biased["choices"]}
    assert token == server.post("/detokenize", {"model": "qwen", "tokens": [70] * 3}).json["prompt"]
    for key, alike in LIKE.items():
        one, other = (scores(server, each, long) for each in (key, alike))
        assert one == pytest.approx(other, abs=1e-3)
    metrics = server.get("/metrics").body.decode()
    assert 'mlx_server_rank_up{rank="1"} 1.0' in metrics
    assert re.search(r'batch_rows_count\{model="tensor"\} [1-9]', metrics)


def check_a_load_that_fails(server):
    failed = server.post("/v1/models/load", {"model": "/nowhere", "key": "impossible", "replace": True})
    assert failed.status in (400, 503)
    refused = server.chat("impossible", "Hello")
    assert refused.status == 503
    assert "mlx-lm can't make a pipeline of a 'llama'" in refused.error["message"]
    unloaded = server.post("/v1/models/unload", {"key": "pipeline"}).json
    assert unloaded["key"] == "pipeline"
    assert server.chat("pipeline", "Hello", max_tokens=2).status == 200  # loaded again


def check_a_lost_rank(ranks):
    """Its streams end with an error that names it; what rank 0 has alone is served on; the rest ends in order."""
    with ranks.server.stream("tensor", "Hello", max_tokens=ROOM - 1000, temperature=0) as stream:
        stream.read(3)
        ranks.processes[1].kill()
        *_, last = stream
    assert "Rank 1 (127.0.0.1) is lost" in last["error"]["message"]
    assert ranks.server.chat("llama", "Hello", max_tokens=2).status == 200
    refused = ranks.server.chat("tensor", "Hello")
    assert (refused.status, refused.error["code"]) == (503, "rank_lost")
    health = ranks.server.get("/health").json
    assert (health["status"], health["ranks"][1]["status"]) == ("degraded", "lost")
    assert ranks.server.stop().status == 0


def test_a_rank_that_falls_silent_ends_what_it_shared_and_leaves_when_it_wakes(settings):
    with running_ranks(settings.with_name("silent.toml")) as ranks:
        with ranks.server.stream("tensor", "Hello", max_tokens=ROOM - 1000, temperature=0) as stream:
            stream.read(3)
            ranks.processes[1].send_signal(signal.SIGSTOP)
            *_, last = stream
        assert "Rank 1 (127.0.0.1) is lost: no message for 5 s" in last["error"]["message"]
        assert ranks.server.chat("llama", "Hello", max_tokens=2).status == 200
        assert ranks.server.get("/health").json["ranks"][1]["error"] == "no message for 5 s"
        ranks.processes[0].kill()
        ranks.processes[1].send_signal(signal.SIGCONT)
        ranks.processes[1].wait(DEADLINE)


def test_a_rank_that_makes_no_step_is_noticed_and_one_without_room_refuses(settings, tmp_path):
    """One start of the processes for both. The ranks have different memory limits."""
    own = {"configs": {1: settings.with_name("small.toml")}, "scripts": {1: "tests/support/faulty_rank.py"}}
    with running_ranks(settings.with_name("watched.toml"), **own, variables={"FAULTS": str(tmp_path)}) as ranks:
        check_loads_of_shared_models(ranks.server, settings.with_name("llama"))
        with ranks.server.stream("tensor", "Hello", max_tokens=ROOM - 1000, temperature=0) as stream:
            stream.read(3)
            (tmp_path / "wedge").touch()
            *_, last = stream
        assert re.search(r"1 \(127.0.0.1\) (is|are) lost: no step for 5 s", last["error"]["message"])
        assert ranks.server.chat("llama", "Hello", max_tokens=2).status == 200
        statuses = {key: ranks.server.get(f"/v1/models/{key}").json["status"]["value"] for key in ("tensor", "llama")}
        assert statuses == {"tensor": "failed", "llama": "loaded"}
        assert ranks.server.get("/health").json["ranks"][1]["error"] == "no step for 5 s"
        assert ranks.server.stop().status == 0
        ranks.processes[1].wait(DEADLINE)


def check_loads_of_shared_models(server, llama):
    """POST /v1/models/load takes `shard`, and a rank that has no memory for its share says so."""
    loaded = server.post("/v1/models/load", {"model": str(llama), "key": "later", "shard": "tensor"})
    assert (loaded.status, loaded.json["status"]) == (200, "loaded")
    assert said(server, "later", 0) == said(server, "llama", 0)
    contradicting = server.post("/v1/models/load", {"model": str(llama), "key": "later", "shard": "pipeline"})
    assert contradicting.error["code"] == "model_exists"
    large = {"model": str(llama), "key": "large", "shard": "tensor", "cache_tokens": 20_000_000}
    refused = server.post("/v1/models/load", large)
    assert (refused.status, refused.json["error"]["code"]) == (507, "insufficient_memory")
    assert "On rank 1 (127.0.0.1), model 'large' needs" in refused.json["error"]["message"]
    projection = refused.json["projection"]
    assert projection["needed"] > projection["free"] < projection["budget"] == 2 * 10**9
    assert server.chat("tensor", "Hello", max_tokens=2).status == 200


def test_a_rank_0_that_waits_for_the_others_ends_with_what_it_has_started(settings, tmp_path):
    processes, logs = start_ranks(tmp_path, [settings, settings], wanted=1)
    try:
        children = Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children")
        if not children.exists():
            pytest.skip("this system does not list a process's children")
        (child,) = children.read_text().split()
        processes[0].terminate()
        assert processes[0].wait(DEADLINE) == 128 + signal.SIGTERM
        eventually(lambda: not Path(f"/proc/{child}").exists())  # once its new parent has taken its status
    finally:
        end(processes, logs)


def test_a_signal_while_rank_0_starts_its_process_ends_that_process():
    code = """if True:
        import os, signal, sys
        from mlxserver.engine.distributed.rendezvous import Rendezvous
        sys.orig_argv = [sys.executable, "-c", "import time; time.sleep(60)"]
        sys.addaudithook(lambda name, arguments: name == "subprocess.Popen" and os.kill(os.getpid(), signal.SIGTERM))
        try:
            Rendezvous({}, 1.0).start({"NCCL_HOST_IP": "127.0.0.1"})
        except SystemExit as end:
            print(end.code)
        os.waitpid(-1, os.WNOHANG)"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert ended.stdout.strip() == str(128 + signal.SIGTERM)
    assert "ChildProcessError" in ended.stderr  # no child is left


@pytest.mark.parametrize("shard", ["tensor", "pipeline"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_share_takes_what_it_was_expected_to(settings, shard, number):
    directory = settings.with_name({"tensor": "llama", "pipeline": "qwen"}[shard])
    spec, position = ModelSpec("a", str(directory), shard=shard), RankPosition(number, 2)
    whole = estimate.estimate(spec)
    expected = share(whole, spec, position)
    assert loader.load(spec, divide=divider(spec, position)).weight_bytes == expected.weights < whole.weights
    parts = {"tensor": (1, 2), "pipeline": ((2, 3), (1, 3))[number]}[shard]
    assert expected.cache == whole.cache * parts[0] // parts[1]


@pytest.mark.parametrize(
    ("heartbeats", "expected"),
    [
        ([(7, 2.0), (7, 4.0)], []),
        ([(7, 11.0), (7, 0.0)], [0]),
        ([(8, 11.0), (7, 9.0)], [1]),
        ([(7, 11.0), (7, 9.0), (9, 8.0)], [0, 1]),
        ([(7, 11.0), (7, 90.0, True)], []),
    ],
    ids=["none", "one", "the one behind", "both that are behind", "one reads a model"],
)
def test_of_ranks_that_make_no_step_those_behind_are_stalled(heartbeats, expected):
    followers = [Follower(number, "10.0.0.1", None) for number in range(len(heartbeats))]
    for follower, (done, seconds, *reading) in zip(followers, heartbeats, strict=True):
        follower.note_heartbeat({"memory_bytes": 0, "done": done, "step_seconds": seconds, "is_reading": bool(reading)})
    assert [follower.rank for follower in stalled(followers, 10.0)] == expected


def test_a_rank_that_has_waited_for_one_that_was_reading_is_not_at_fault():
    followers = [Follower(number, "10.0.0.1", None) for number in range(2)]
    reader, waiter = followers
    heartbeat = {"memory_bytes": 0, "done": 7, "step_seconds": 0.0}
    reader.note_heartbeat(heartbeat | {"is_reading": True})
    reader.note_heartbeat(heartbeat | {"is_reading": False})
    waiter.note_heartbeat(heartbeat | {"step_seconds": 90.0, "is_reading": False})
    assert stalled(followers, 10.0) == []


def test_a_load_names_one_of_the_two_ways_to_share():
    assert parse(LoadRequest, b'{"model": "org/name", "shard": "pipeline"}').shard == "pipeline"
    with pytest.raises(ValidationFailed) as refused:
        parse(LoadRequest, b'{"model": "org/name", "shard": "rows"}')
    assert refused.value.param == "shard"


class Rank:
    """The loads of the only rank that there is. `meanwhile` is called as often as it may do something else."""

    def __init__(self, memory_limit=0):
        self.sent, self.fetched = [], queue.SimpleQueue()
        self.meanwhile = lambda: None
        self.pauses = 0
        self.loads = Loads(mx.distributed.init(), memory_limit, self.sent.append, self.fetched.put, self._pause)

    def _pause(self):
        self.pauses += 1
        self.meanwhile()

    def load(self, source):
        """What begin() and load() send to the leader, and what was loaded."""
        spec = {"key": "a", "source": str(source), "shard": "tensor", "cache_tokens": 100}
        self.loads.begin({"kind": "load", "number": 1, "spec": spec})
        loaded = self.loads.load(self.fetched.get(timeout=DEADLINE))
        return loaded, self.sent


def test_a_rank_pauses_while_it_reads_and_reports_what_it_has(settings):
    rank = Rank()
    (spec, loaded), (reply,) = rank.load(settings.with_name("llama"))
    assert (reply["kind"], reply["number"], reply["weight_bytes"]) == ("loaded", 1, loaded.weight_bytes)
    assert rank.pauses > 1
    assert not rank.loads.is_reading


def test_a_load_that_is_forgotten_ends_at_its_next_pause_and_holds_nothing(settings):
    rank = Rank()
    rank.meanwhile = lambda: rank.loads.forget(1)
    assert rank.load(settings.with_name("llama")) == (None, [])
    rank.meanwhile = lambda: None
    assert rank.load(settings.with_name("llama"))[0]


def test_a_share_without_room_is_refused_with_a_projection(settings):
    loaded, (reply,) = Rank(memory_limit=1_000_000).load(settings.with_name("llama"))
    assert loaded is None
    assert reply["projection"]["needed"] > reply["projection"]["free"] == reply["projection"]["budget"] == 1_000_000


def test_what_can_not_be_fetched_is_reported(settings):
    sent = []
    loads = Loads(mx.distributed.init(), 0, sent.append, None, lambda: None)
    loads.begin({"kind": "load", "number": 3, "spec": {"key": "a", "source": "/nowhere"}})
    eventually(lambda: sent)
    assert sent == [
        {"kind": "loaded", "number": 3, "error": "Model source '/nowhere': there is no such file or directory"}
    ]


def test_a_rank_with_other_settings_is_refused_with_both_values(settings, tmp_path):
    processes, logs = start_ranks(tmp_path, [settings, settings.with_name("other.toml")])
    try:
        assert [process.wait(DEADLINE) for process in processes] == [2, 2]
        for log in logs:
            log.seek(0)
            assert "another models.tensor.max_running than rank 0: 3 instead of 32" in log.read()
    finally:
        end(processes, logs)


def test_a_shared_model_needs_ranks():
    with pytest.raises(LoadFailed, match=re.escape("shard = 'tensor' needs several ranks: start them with mlx.launch")):
        Builder(0.25).build(ModelSpec("a", "/nowhere", shard="tensor"))


def test_what_ranks_must_have_in_common_names_the_difference_and_holds_no_secrets():
    ours = shared_facts("1", Settings(models=(ModelSpec("a", "b", shard="tensor"),), api_key=("not-to-be-sent",)))
    assert "not-to-be-sent" not in repr(ours)
    compare(1, dict(ours), ours)
    with pytest.raises(RanksDiffer, match=re.escape("Rank 1 was started with another mlx than rank 0: 0.1 instead of")):
        compare(1, ours | {"mlx": "0.1"}, ours)
    with pytest.raises(RanksDiffer, match=re.escape("models.a.key than rank 0: nothing instead of 'a'")):
        compare(2, {name: value for name, value in ours.items() if name != "models.a.key"}, ours)


samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    logit_bias=st.dictionaries(st.integers(0, 200_000), st.floats(-100, 100), max_size=5),
)


@given(st.lists(samplings, min_size=1, max_size=4), st.lists(st.integers(0, 200_000), min_size=1))
def test_rows_arrive_as_they_were_sent(settings_of_rows, tokens):
    rows = [
        Sequence(-n, tuple(tokens), sampling, 7 + n, n or None, boundaries=(len(tokens), 1), prompt_logprobs=2)
        for n, sampling in enumerate(settings_of_rows)
    ]
    arrived = decode_sequences(through_json(encode_sequences(rows)), lambda sequence_id, accepted: None)
    masked = [row.sampling.seed if row.sampling.seed is None else row.sampling.seed % 2**64 for row in rows]
    assert [row.sampling.seed for row in arrived] == masked
    assert [unseeded(row) for row in arrived] == [unseeded(row) for row in rows]


def unseeded(row):
    fields = {name: getattr(row.sampling, name) for name in SamplingParams.__slots__ if name != "seed"}
    return row.id, row.tokens, row.boundaries, row.max_tokens, row.top_logprobs, row.prompt_logprobs, fields


def test_a_rank_that_does_not_sample_gets_no_sampling_parameters():
    bound = Sequence(1, (1, 2), SamplingParams(temperature=0.3), 5, top_logprobs=2, constraint=Counting())
    assert decode_sequences(through_json(encode_sequences([bound])), None) == [Sequence(1, (1, 2), SamplingParams(), 5)]


def test_tokens_arrive_as_they_were_sent():
    tokens = [SampledToken(1, 2, 3, Logprobs(-0.5, ((4, -1.5), (5, float("-inf")))), 6.25), SampledToken(7, 8)]
    tokens.append(SampledToken(9, 8, prompt_logprobs=(Logprobs(-0.5, ((4, -1.5),), 3), Logprobs(-2.0))))
    tokens.append(SampledToken(9, 8, prompt_logprobs=()))
    assert decode_tokens(through_json(encode_tokens(tokens))) == tokens


class Counting:
    """Allows the token that is as many as it has accepted."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        return (1 << len(self.accepted)).to_bytes(2, "little")

    def accept(self, token):
        self.accepted.append(token)


def test_a_constraint_is_asked_where_it_is():
    here, questions = Counting(), []

    def ask(sequence_id, accepted):
        questions.append((sequence_id, list(accepted)))
        return decode_mask(through_json(answer(here, accepted)))

    there = RemoteConstraint(9, ask)
    assert there.allowed() == b"\x01\x00"
    for token in (5, 6):
        there.accept(token)
    assert there.allowed() == b"\x04\x00"
    assert (questions, here.accepted) == ([(9, []), (9, [5, 6])], [5, 6])


def through_json(content):
    return orjson.loads(orjson.dumps(content))


def test_a_link_carries_messages_both_ways_and_its_end_is_noticed():
    near, far = (Link(each, DEADLINE) for each in tcp_pair())
    near.send({"kind": "a", "numbers": list(range(100_000))})
    far.send({"kind": "b"})
    assert len(far.receive()["numbers"]) == 100_000
    assert near.receive() == {"kind": "b"}
    far.close()
    with pytest.raises(LinkLost):
        near.receive()
        near.receive()
    near.close()


def test_silence_is_the_end_of_a_link_and_heartbeats_are_not_silence():
    near, far = (Link(each, 1.5) for each in tcp_pair())
    near.heartbeat(lambda: {"memory_bytes": 5})
    assert [far.receive() for _ in range(6)] == [{"kind": "heartbeat", "memory_bytes": 5}] * 6  # longer than the limit
    with pytest.raises(LinkLost, match=re.escape("no message for 1.5 s")):
        near.receive()
    near.close()
    far.close()


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\0\0\0\2no", b"\0\0\0\2[]", b"\0\0"])
def test_what_is_no_message_ends_a_link(sent):
    stranger, connection = tcp_pair()
    stranger.sendall(sent)
    stranger.close()
    link = Link(connection, DEADLINE)
    with pytest.raises(LinkLost):
        link.receive()
    link.close()


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        return near, far
