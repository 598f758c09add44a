"""Parts of the benchmarks: loads on a real socket server, and the figures computed from them. No speed is tested."""

import asyncio
import json
import os
import sys
from math import inf
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
from benchmarks.rounds import Schedule, measure_rounds, medians
from benchmarks.run import choose_scenarios, read_arguments
from benchmarks.scenarios import scenarios
from benchmarks.servers import EMBEDDING, FIRST, GGUF, LLAMA, OURS, SECOND, VLLM_MLX, ServerFailed
from benchmarks.settings import CPU
from benchmarks.shards import render as render_shards
from benchmarks.shards import variables
from benchmarks.stats import decode_rate, percentile, summarise
from benchmarks.vocabulary import END, Prompts, write_endless_tokenizer
from benchmarks.worker import Worker
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


def table_of(rounds, *, gpu=False, dtype="float32", peak=16):
    """Cells of a table, by measure and what is compared."""
    settings = {"model": {"dtype": dtype}, "sizes": {"concurrency": [1, peak], "raw_batch": 16}}
    table = render({"machine": {"gpu": gpu}, "settings": settings, "rounds": rounds})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {(row[0], row[1]): row[2:] for row in rows}


def rates(ours, theirs, scenario="sampled c=16", part="mlx_lm.server"):
    """One round, in tokens/s."""
    return {name: {scenario: {"tokens_per_second": rate}} for name, rate in (("ours", ours), (part, theirs)) if rate}


def test_the_table_shows_ratios_against_their_targets_and_leaves_out_what_was_not_measured():
    cells = table_of([rates(60.0, 40.0)])
    assert cells["sampled c=16, tokens/s", "ours / mlx_lm.server"] == ["60.0", "40.0", "1.50", "1.50", "≥ 2.2", "no"]
    assert len(cells) == 1


def test_a_ratio_is_the_median_of_the_ratios_of_rounds_that_have_both_sides():
    rounds = [rates(90.0, 30.0), rates(20.0, 10.0), rates(50.0, 20.0), rates(1000.0, None)]
    cells = table_of(rounds)["sampled c=16, tokens/s", "ours / mlx_lm.server"]
    assert cells == ["50.0", "20.0", "2.50", "3.00 2.00 2.50", "≥ 2.2", "yes"]
    assert medians(rounds)["ours"]["sampled c=16"]["tokens_per_second"] == 70.0


@pytest.mark.parametrize(
    ("gpu", "dtype", "limit"), [(False, "float32", 2.2), (True, "bfloat16", 4.5), (True, "4bit", 6)]
)
def test_targets_are_those_of_the_device_and_the_weights(gpu, dtype, limit):
    cells = table_of([rates(60.0, 40.0)], gpu=gpu, dtype=dtype)
    assert cells["sampled c=16, tokens/s", "ours / mlx_lm.server"][4] == f"≥ {limit}"


def test_llama_server_is_compared_with_the_same_file_for_1_4_and_16_clients():
    cells = {n: table_of([rates(8.0, 10.0, f"gguf c={n}", "llama-server")]) for n in (1, 4, 16)}
    compared = {n: each[f"gguf c={n}, tokens/s", "ours / llama-server"] for n, each in cells.items()}
    assert {n: (each[2], *each[4:]) for n, each in compared.items()} == {
        1: ("0.80", "≥ 0.7", "yes"),
        4: ("0.80", "≥ 0.8", "yes"),
        16: ("0.80", "≥ 1.2", "no"),
    }


def test_results_of_speculation_fill_their_rows():
    figures = {"edit task": {"on": 40.0, "off": 20.0}, "free text": {"on": 19.0, "off": 20.0}}
    cells = table_of([{"speculation": figures}])
    assert cells["edit task, tokens/s", "speculation on / speculation off"][2:] == ["2.00", "2.00", "≥ 1.5", "yes"]
    assert cells["free text, tokens/s", "speculation on / speculation off"][2:] == ["0.95", "0.95", "≥ 0.98", "no"]


class Contender:
    """Contestant that notes what happens to it."""

    def __init__(self, part, log, error=None):
        self.part, self.scenarios, self._log, self._error = part, ("one", "two"), log, error

    def measure(self, scenario, number, limit):
        self._log.append(f"{self.part} {scenario} {number}")
        if self._error and scenario == "one":
            raise self._error
        return {"figure": float(number)}

    def pause(self):
        self._log.append(f"{self.part} stops")

    def resume(self):
        self._log.append(f"{self.part} runs")


def test_contestants_are_measured_in_turn_and_alone_and_every_other_round_backwards():
    log, rounds = [], []
    measure_rounds([Contender("a", log), Contender("b", log)], ["two"], rounds, Schedule(2, 1, inf), print)
    runs = [(part, number) for number, parts in enumerate(["ab", "ba"]) for part in parts]
    assert log == [step for part, n in runs for step in (f"{part} runs", f"{part} two {n}", f"{part} stops")]
    assert [result["b"]["two"]["figure"] for result in rounds] == [0.0, 1.0]


@pytest.mark.parametrize("error", [TimeoutError(), ServerFailed("gone")])
def test_what_fails_once_is_reported_and_left_out_of_later_rounds(error):
    log, rounds, lines = [], [], []
    measure_rounds([Contender("a", log, error)], ["one", "two"], rounds, Schedule(2, 1, inf), lines.append)
    assert [step for step in log if "one" in step] == ["a one 0"]
    assert [[*result["a"]] for result in rounds] == [["two"], ["two"]]
    assert sum("left out" in line for line in lines) == 1


def test_no_scenario_begins_when_the_time_is_over():
    log, lines = [], []
    measure_rounds([Contender("a", log)], ["one"], [], Schedule(2, 1, 0.0), lines.append)
    assert not log
    assert "the time is over" in lines[0]


def test_a_worker_answers_lines_and_can_be_stopped_and_ends_when_it_takes_too_long():
    code = "import time; from benchmarks.worker import answer_lines; answer_lines(lambda n: [n + 1, time.sleep(n)][0])"
    worker = Worker("adder", [sys.executable, "-c", code], dict(os.environ))
    assert worker.ask(0, 30.0) == 1
    worker.pause()
    worker.resume()
    with pytest.raises(TimeoutError):
        worker.ask(30, 0.1)
    with pytest.raises(ServerFailed, match="has ended"):
        worker.ask(0, 30.0)


def test_a_worker_that_ends_at_its_start_has_failed():
    with pytest.raises(ServerFailed, match="ended with status 3"):
        Worker("ended", [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))


def test_scenarios_are_for_the_servers_that_have_their_models():
    known = scenarios(CPU)
    taken = {
        LLAMA: {name for name, each in known.items() if each.takes(LLAMA, {GGUF})},
        VLLM_MLX: {name for name, each in known.items() if each.takes(VLLM_MLX, {FIRST})},
    }
    assert taken == {LLAMA: {"gguf c=1", "gguf c=4", "gguf c=16"}, VLLM_MLX: {"sampled c=1", "sampled c=16"}}
    assert {name for name, each in known.items() if each.takes(OURS, {FIRST, SECOND, GGUF, EMBEDDING})} == {*known}


def test_scenarios_without_a_target_are_measured_only_when_all_or_they_are_asked_for():
    def chosen(*argv):
        return choose_scenarios(read_arguments(argv, gpu=False), CPU)

    assert "greedy c=16" not in chosen()
    assert {"agent session", "greedy batch c=16", "gguf c=4"} <= set(chosen())
    assert "greedy c=16" in chosen("--full")
    assert chosen("--only", "second turn") == ["second turn"]
    with pytest.raises(SystemExit, match="'greedy c=5' is not valid"):
        chosen("--only", "greedy c=5")


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
