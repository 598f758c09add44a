import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from mlxserver.engine.mlx import mx

import gguf as gguf_package
import numpy as np
import pytest
from gguf2mlx.quantize import gguf_codes as codes
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlxserver.config.errors import abbreviate
from mlxserver.engine.loading import gguf, gguf_conversion, sources
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.gguf_reader import Reader
from mlxserver.engine.loading.sources import GgufFile, MlxDirectory, Repository
from mlxserver.engine.platform.policy import WeightPolicy
from tests.support.hub import serving_hub
from tools.harness.tiny_gguf import write_tiny_gguf

RESOLVE = """
import sys
from mlxserver.engine.loading import sources
print(sources.resolve(sys.argv[1], progress=lambda *p: print(p)))
"""

# A process that stands still in the middle of a conversion.
HALF_WAY = """
import sys, time
from mlxserver.engine.loading import sources
sources.resolve(sys.argv[1], progress=lambda stage, done, total: total and (print(done, flush=True), time.sleep(600)))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, for this process and those it starts."""
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def resolve_elsewhere(source, script=RESOLVE):
    """Another process that resolves the source."""
    return subprocess.Popen([sys.executable, "-c", script, str(source)], stdout=subprocess.PIPE, text=True)


def unfinished(cache):
    return list(cache.glob("*.partial"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", Repository("org/name")),
        ("mlx-community/QwQ-32B-4bit", Repository("mlx-community/QwQ-32B-4bit")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
    ],
)
def test_an_org_and_a_name_are_a_hub_repository(source, expected):
    assert sources.parse(source) == expected


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("", "expected embedded:NAME"),
        ("gpt2", "expected embedded:NAME"),
        ("org/name@", "expected embedded:NAME"),
        ("org/na--me", "expected embedded:NAME"),
        ("a/b/c", "expected embedded:NAME"),
        ("embedded:nothing", "expected one of embedded:smollm2"),
        ("/nowhere/at/all", "no such file or directory"),
        ("missing.gguf", "No such file or directory"),
        ("x\0y", "null"),
        ("x" * 5000, "too long"),
        (__file__, "no model"),
        (str(Path(__file__).parent), "no config.json"),
    ],
)
def test_a_source_that_cannot_be_right_is_refused_with_what_was_expected(source, complaint):
    with pytest.raises(SourceInvalid, match=complaint) as caught:
        sources.check(source)
    assert abbreviate(source) in str(caught.value)
    assert len(str(caught.value)) < 600


@given(st.text() | st.from_regex(r"(embedded:|~|\.|/)?[\w./@~-]*(\.gguf)?"))
def test_any_text_is_a_source_or_is_refused(text):
    try:
        source = sources.parse(text)
    except SourceInvalid as error:
        assert abbreviate(text) in str(error)
    else:
        assert isinstance(source, GgufFile | MlxDirectory | Repository)


def test_a_directory_with_a_config_is_a_model_and_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "org" / "name"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert sources.parse("org/name") == MlxDirectory(model)
    assert sources.resolve("org/name") == model


def test_a_file_that_only_claims_to_be_gguf_is_refused_early(tmp_path):
    fake = tmp_path / "fake.gguf"
    fake.write_text("hello")
    with pytest.raises(SourceInvalid, match="is not a GGUF file"):
        sources.check(str(fake))


def test_the_embedded_model_becomes_an_mlx_directory():
    directory = sources.resolve("embedded:smollm2")
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    assert list(directory.glob("model*.safetensors"))


def test_blank_lines_of_the_embedded_model_are_split_as_its_file_states():
    """The converter does not know the file's tokenizer.ggml.pre and makes one token of a blank line."""
    tokenizer = Tokenizer.from_file(str(sources.resolve("embedded:smollm2") / "tokenizer.json"))
    assert tokenizer.encode("a\n\nb").tokens == ["a", "Ċ", "Ċ", "b"]
    assert tokenizer.encode("a\n\n\nb").tokens == ["a", "ĊĊ", "Ċ", "b"]
    assert tokenizer.encode("in 1969").tokens == ["in", "Ġ", "1", "9", "6", "9"]


def test_a_gguf_file_is_converted_once(tiny_gguf, cache):
    reports = []
    first = sources.resolve(str(tiny_gguf), progress=lambda *report: reports.append(report))
    converted_at = first.stat().st_mtime_ns
    assert first.parent == cache
    assert {stage for stage, *_ in reports} == {"converting"}
    assert reports[0][1:] == (0, 0)
    assert reports[-1][1] == reports[-1][2] > 0
    reports.clear()
    assert sources.resolve(str(tiny_gguf), progress=lambda *report: reports.append(report)) == first
    assert (reports, first.stat().st_mtime_ns) == ([], converted_at)
    assert not unfinished(cache)


def test_a_gguf_file_is_converted_to_the_format_of_the_policy(tiny_gguf, cache):
    types = {}
    for weights in WeightPolicy:
        (file,) = sources.resolve(str(tiny_gguf), weights=weights).glob("*.safetensors")
        types[weights] = {array.dtype for array in mx.load(str(file)).values()}
    halves = {WeightPolicy.STORED: {mx.float16}, WeightPolicy.BFLOAT16: {mx.float16}}
    assert types == {**halves, WeightPolicy.FLOAT32: {mx.float32}, WeightPolicy.QUANTIZED: {mx.float32}}
    assert len(list(cache.glob("tiny-*/config.json"))) == 3


def test_a_conversion_that_keeps_blocks_reports_its_progress(tmp_path, cache):
    path, reports = write_tiny_gguf(tmp_path / "tiny.gguf", types=("Q4_0",)), []
    sources.resolve(str(path), progress=lambda *report: reports.append(report), weights=WeightPolicy.QUANTIZED)
    assert reports[0] == ("converting", 0, 0)
    assert reports[-1] == ("converting", 20, 20)


def test_a_gguf_file_is_read_as_by_gguf_itself(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", types=("Q4_0", "F16"))
    own, theirs = Reader(path), gguf_package.GGUFReader(path)
    assert {name: field.contents() for name, field in own.fields.items()} == {
        name: field.contents() for name, field in theirs.fields.items()
    }
    for name, field in own.fields.items():
        assert (field.types, field.data, len(field.parts)) == (
            theirs.fields[name].types,
            theirs.fields[name].data,
            len(theirs.fields[name].parts),
        )
        assert all(field.contents(n) == theirs.fields[name].contents(n) for n in (0, 1) if len(field.data) > 1)
    for tensor, other in zip(own.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.data_offset) == (other.name, other.data_offset)
        assert np.array_equal(tensor.data, other.data)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_are_packed_and_decoded_as_by_the_converter(bits):
    random = np.random.default_rng(0)
    values = random.integers(0, 1 << bits, (5, 96), np.uint8)
    scales, biases = random.normal(size=(2, 5, 3)).astype(np.float16)
    packed = gguf_conversion.pack(values, bits)
    assert np.array_equal(packed, codes.pack_codes(values, bits))
    assert np.array_equal(gguf_conversion.unpack(packed, bits, 96), values)
    expected = codes.affine_decode(packed, scales, biases, bits)
    assert np.array_equal(gguf_conversion.decode(packed, scales, biases, bits), expected)


def test_a_changed_gguf_file_is_converted_anew(tmp_path, cache):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = sources.resolve(str(path))
    write_tiny_gguf(path, seed=1)
    assert sources.resolve(str(path)) != first


def test_two_processes_at_once_convert_once(tiny_gguf, cache):
    processes = [resolve_elsewhere(tiny_gguf) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(any("converting" in line for line in lines) for lines in outputs) == [False, True]


def test_a_conversion_whose_process_was_killed_is_done_anew(tiny_gguf, cache):
    process = resolve_elsewhere(tiny_gguf, HALF_WAY)
    assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert unfinished(cache)
    directory = sources.resolve(str(tiny_gguf))
    assert (directory / "config.json").is_file()
    assert not unfinished(cache)


def test_leftovers_of_other_files_are_removed_unless_they_are_locked(tiny_gguf, cache):
    for name in ("dead", "alive"):
        (cache / f"{name}.partial" / "model").mkdir(parents=True)
    with gguf._locked(cache / "alive.lock"):
        sources.resolve(str(tiny_gguf))
    assert [path.name for path in unfinished(cache)] == ["alive.partial"]


def test_a_truncated_gguf_file_is_refused_with_the_converter_s_message(tiny_gguf, tmp_path, cache):
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_gguf.read_bytes()[: tiny_gguf.stat().st_size // 2])
    with pytest.raises(SourceInvalid, match="could not be converted: .*cannot reshape|could not be converted: .*GGUF"):
        sources.resolve(str(half))
    assert not unfinished(cache)


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceInvalid, match="Not a directory|File exists"):
        sources.resolve(str(tiny_gguf))


FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w" * 300_000, "run.py": b"print()"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with the repository org/tiny, and an empty download cache."""
    with serving_hub(FILES, tmp_path / "hub", monkeypatch) as server:
        yield server


def test_a_hub_repository_is_downloaded_with_progress_in_bytes_and_without_its_code(hub, capfd):
    reports = []
    directory = sources.resolve("org/tiny", progress=lambda *report: reports.append(report))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    total = sum(len(FILES[name]) for name in ("config.json", "model.safetensors"))
    assert reports[-1] == ("downloading", total, total)
    assert capfd.readouterr() == ("", "")


def test_a_downloaded_repository_is_there_without_the_network(hub):
    directory = sources.resolve("org/tiny")
    hub.shutdown()
    hub.server_close()
    assert sources.resolve("org/tiny") == directory


def test_an_unknown_repository_is_named(hub):
    with pytest.raises(SourceInvalid, match="'org/missing': no such repository"):
        sources.resolve("org/missing")


def test_a_hub_that_cannot_be_reached_is_named(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(SourceInvalid, match="expected a network connection"):
        sources.resolve("org/other")
