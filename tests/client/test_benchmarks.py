"""Parts of the benchmarks: loads on a real socket server, and the figures computed from them. No speed is tested."""

import asyncio
import json
from pathlib import Path

import pytest
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.agent_session import Figures, Turn
from benchmarks.agent_session import render as render_session
from benchmarks.kinds import KINDS, SIZES, kind_config
from benchmarks.load import run_load, run_one, target
from benchmarks.ranks import Deployment
from benchmarks.report import render
from benchmarks.shards import render as render_shards
from benchmarks.shards import variables
from benchmarks.stats import decode_rate, percentile, summarise
from benchmarks.vocabulary import END, Prompts, write_endless_tokenizer
from mlxserver.client.bench.load import Sample
from mlxserver.client.errors import StreamBroken
from mlxserver.client.events import Usage
from mlxserver.client.stats import Timing


def chunk(text, reason=None):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
ANSWERS = {
    "fine": HEAD + chunk("") + chunk("one") + chunk("two") + chunk("", "stop") + USAGE + DONE,
    "no usage": HEAD + chunk("one") + chunk("two", "stop") + DONE,
    "refused": b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"error": "full"}',
    "broken": HEAD + chunk("one"),
    "silent": b"",
    "garbled": HEAD + b"data: {nonsense\n\n",
}


async def load(model, requests, clients):
    """Samples of a load on a real socket server that answers by the model's name; and the most clients at once."""
    running, most = 0, 0

    async def answer(reader, writer):
        nonlocal running, most
        running += 1
        most = max(most, running)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        writer.write(ANSWERS[json.loads(await reader.readexactly(length))["model"]])
        await writer.drain()
        running -= 1
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as server,
        target(server.sockets[0].getsockname()[1]) as under_load,
    ):
        question = {"role": "user", "content": "hi"}
        prepared = [under_load.prepare(model, [question], 5, {}) for _ in range(requests)]
        return await run_load(prepared, clients), most


def test_a_load_samples_text_tokens_and_times_of_each_request():
    samples, most = asyncio.run(load("fine", 6, 3))
    assert len(samples) == 6
    assert most <= 3
    for sample in samples:
        assert (sample.text, sample.timing.usage, sample.error) == ("onetwo", Usage(7, 5), None)
        assert len(sample.timing.arrivals) == 2
        assert sample.timing.start <= sample.timing.arrivals[0] <= sample.timing.end
        assert sample.connecting > 0


def test_tokens_are_counted_by_their_arrivals_where_a_server_sends_no_usage():
    samples, _ = asyncio.run(load("no usage", 1, 1))
    assert summarise(samples).tokens == 2


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("refused", "full"),
        ("broken", "broke off"),
        ("silent", "the connection ended before the head of a response"),
        ("garbled", "where a JSON object was expected"),
    ],
)
def test_a_request_that_fails_is_a_sample_with_its_error(model, error):
    samples, _ = asyncio.run(load(model, 1, 1))
    assert samples[0].timing is None
    assert error in str(samples[0].error)


def test_a_missing_server_is_a_sample_with_an_error():
    async def send():
        async with target(1) as under_load:
            return await run_one(under_load.prepare("m", [], 1, {}))

    assert "Connection refused" in str(asyncio.run(send()).error)


def sample(start, end, arrivals, tokens):
    return Sample(Timing(start, end, arrivals, usage=Usage(completion_tokens=tokens)))


def test_the_summary_counts_tokens_while_all_clients_run():
    """Two clients: the first request of three ends at 2, the last at 6; from 4 on only one runs."""
    samples = [
        sample(0.0, 2.0, (1.0, 2.0), 2),
        sample(0.0, 4.0, (1.0, 4.0), 2),
        sample(2.0, 6.0, (3.0, 4.0, 5.0, 6.0), 4),
        Sample(error=StreamBroken("status 500")),
        sample(2.0, 3.0, (), 9),  # parts of characters
    ]
    summary = summarise(samples)
    assert summary.tokens_per_second == pytest.approx(6 / 4)
    assert summary.overall_tokens_per_second == pytest.approx(8 / 6)
    assert (summary.requests, summary.errors, summary.ttft_p50) == (5, 1, 1.0)


def test_a_load_whose_requests_all_failed_has_no_summary_but_the_first_error():
    with pytest.raises(ValueError, match="status 500"):
        summarise([Sample(error=StreamBroken("status 500"))])


def test_percentiles_lie_between_neighbours():
    assert [percentile([3.0, 1.0, 2.0], p) for p in (0, 50, 75, 100)] == [1.0, 2.0, 2.5, 3.0]
    assert percentile([], 50) != percentile([], 50)


def test_the_decode_rate_looks_at_full_steps_only():
    """Steps at 1, 2 and 3 have both sequences, that at 9 only one."""
    timings = [Timing(0.0, 3.0, (1.0, 2.0, 3.0)), Timing(0.0, 9.0, (1.0, 2.0, 3.0, 9.0))]
    assert decode_rate(timings, 2) == 2.0


@pytest.fixture
def endless(tmp_path):
    """A small trained tokenizer made endless, for a model of 600 ids."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(["time and time again"], trainers.BpeTrainer(initial_alphabet=alphabet))
    trained.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "time"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    target = tmp_path / "endless"
    target.mkdir()
    write_endless_tokenizer(tmp_path, target, 600)
    return target


def test_an_endless_tokenizer_has_a_text_for_every_id_and_its_end_beyond_them(endless):
    tokenizer = Tokenizer.from_file(str(endless / "tokenizer.json"))
    assert tokenizer.token_to_id(END) == 600
    assert all(tokenizer.id_to_token(number) for number in range(600))
    assert json.loads((endless / "tokenizer_config.json").read_text())["eos_token"] == END


def test_a_tokenizer_larger_than_the_model_is_refused(endless, tmp_path):
    with pytest.raises(ValueError, match="601 tokens, expected at most the model's 300"):
        write_endless_tokenizer(endless, tmp_path, 300)


def test_prompts_have_the_length_asked_for_differ_and_repeat_by_seed(endless):
    first, again = Prompts(endless), Prompts(endless)
    texts = [first.make(40) for _ in range(3)]
    assert texts == [again.make(40) for _ in range(3)]
    assert len(set(texts)) == 3
    encode = Tokenizer.from_file(str(endless / "tokenizer.json")).encode
    assert all(len(encode(text, add_special_tokens=False).ids) == 40 for text in texts)


def test_the_table_shows_ratios_against_their_targets_and_leaves_out_what_was_not_measured():
    rates = {"ours": {"sampled c=16": {"tokens_per_second": 60.0}}, "mlx_lm.server": {}}
    rates["mlx_lm.server"] = {"sampled c=16": {"tokens_per_second": 40.0}}
    settings = {"sizes": {"concurrency": [1, 16], "raw_batch": 32}}
    table = render({"machine": {"gpu": False}, "settings": settings, "results": rates})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["sampled c=16, tokens/s", "60.0", "40.0", "1.50", "≥ 1.3", "yes"] in cells
    assert not any("two models" in row[0] for row in cells)


def test_ranks_of_a_measurement_get_what_mlx_launch_gives_them(tmp_path):
    ways = [Deployment("nccl", 2, "tensor", {"A": "1"}), Deployment("ring", 2, "tensor")]
    nccl, ring = (way.environments(tmp_path) for way in ways)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in nccl] == [each["MLX_RANK"] for each in nccl] == ["0", "1"]
    assert all(each["MLX_WORLD_SIZE"] == "2" and each["A"] == "1" for each in nccl)
    assert len({each["NCCL_PORT"] for each in nccl}) == 1
    assert [len(json.loads(Path(each["MLX_HOSTFILE"]).read_text())) for each in ring] == [2, 2]
    assert ways[0].name == "2 ranks A=1"


def test_a_table_of_ranks_leaves_out_what_was_not_measured():
    figures = {"tokens_per_second": 10.0, "ttft_p50": 0.5, "ttft_p95": 0.5, "gap_p50": 0.0}
    faster = figures | {"tokens_per_second": 15.0}
    table = render_shards({"one process": {"1": figures, "16": figures}, "2 ranks": {"1": faster}}).splitlines()
    assert len(table) == 1 + 2 * 4
    assert table[1].split() == ["1", "tokens_per_second", "10", "1.00", "15", "1.50"]
    assert table[5].split() == ["16", "tokens_per_second", "10", "1.00"]


def test_turns_of_a_session_stand_beside_the_cold_reads_that_were_measured():
    cold = {2: Turn(4.0, 8.0, 100, 0), 3: Turn(5.0, 0.0, 110, 0)}
    turns = {1: Turn(2.0, 4.0, 90, 0), 2: Turn(0.2, 0.8, 100, 90), 3: Turn(1.0, 2.0, 110, 100)}
    figures = Figures(turns, cold, {"after an unload": Turn(2.5, 0.0, 110, 96)})
    *rows, summary = render_session({"plain": figures}).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:] if row]
    assert cells == [
        ["plain", "turn 1", "90", "0", "2,000", "-", "-", "-"],
        ["plain", "turn 2", "100", "90", "200", "4,000", "0.050", "0.100"],
        ["plain", "turn 3", "110", "100", "1,000", "5,000", "0.200", "-"],
        ["plain", "after an unload", "110", "96", "2,500", "5,000", "0.500", "-"],
    ]
    assert summary.startswith("2 of 3 compared turns")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_has_a_configuration_that_mlx_lm_takes(kind, size):
    model, arguments = _get_classes(kind_config(kind, SIZES[size]))
    assert len(model(arguments.from_dict(kind_config(kind, SIZES["tiny"]))).layers) == 4


def test_variables_of_ranks_are_pairs():
    assert variables("A=1,B=") == {"A": "1", "B": ""}
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        variables("A=1,B")
