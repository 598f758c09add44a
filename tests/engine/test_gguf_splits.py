"""Words of GGUF tokenizers: split as the models' own tokenizers do it, by the file's tokenizer.ggml.pre."""

import json
import logging

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from mlxserver.engine.loading import gguf, gguf_splits

TEXT = (
    "Hello, world! I'll sell 12345 of them's; it'S DeepSeekV3 at $3.50...\n\n\n  def f(x):\r\n\treturn x+1  \n"
    "中文字符和かなカナ 한국어 éclair naïve ÜBER ǅ e\u0301t\u0301 हिन्दी ภาษาไทย ١٢٣ — “quoted”/path\n/x !!\n  "
)


def pieces(pre_tokenizer, text=TEXT):
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


def of_name(name):
    described = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    described["pre_tokenizer"] = gguf_splits.pre_tokenizer(gguf_splits.SPLITS[name])
    return Tokenizer.from_str(json.dumps(described)).pre_tokenizer


def split(*patterns):
    steps = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = ByteLevel(add_prefix_space=False)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("mpt", BYTES),
        ("olmo", BYTES),
        ("smollm", Sequence([Digits(individual_digits=True), BYTES])),
        ("starcoder", Sequence([Digits(individual_digits=True), BYTES])),
        ("stablelm2", split(QWEN2)),
        ("glm4", split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"))),
        ("smaug-bpe", split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"))),
    ],
)
def test_words_are_those_of_the_models_tokenizers(name, own):
    assert pieces(of_name(name)) == pieces(own)


@pytest.mark.parametrize("name", sorted(gguf_splits.SPLITS))
def test_a_text_is_split_whole(name):
    """No character is lost, and a long run of anything is split in no time."""
    assert "".join(pieces(of_name(name))) == TEXT
    for run in ("a" * 20_000, " " * 20_000, "\n" * 20_000, "1" * 999, "!" * 20_000):
        assert "".join(pieces(of_name(name), run)) == run


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("falcon", "in 12345, yes", ["in", " ", "123", "45", ",", " yes"]),
        ("default", "in 12345!", ["in", " ", "123", "45", "!"]),
        ("gpt-4o", "HelloWorld's 12345", ["Hello", "World's", " ", "123", "45"]),
        ("tekken", "HelloWorld's 12", ["Hello", "World", "'s", " ", "1", "2"]),
        ("llama4", "a/b//\n\nc", ["a", "/b", "//\n\n", "c"]),
        ("deepseek-v3", "in 1234 中文x!", ["in", " ", "123", "4", " ", "中文", "x", "!"]),
        ("deepseek-coder", "if x1:\n", ["if", " x", "1", ":", "\n"]),
        ("deepseek-llm", "a 中文12\n", ["a", " ", "中文", "12", "\n"]),
        ("bloom", "Hello there, you", ["Hello", " there", ",", " you"]),
        ("viking", "in 12", ["in", " ", "1", "2"]),
        ("superbpe", "we do 1234567", ["we do ", "1", "234", "567"]),
        ("kimi-k2", "HiThere中文 12345", ["Hi", "There", "中文", " ", "123", "45"]),
        ("tiny_aya", "n 12345", ["n", " ", "12", "345"]),
        ("bailingmoe", "a\n\n\nb", ["a", "\n\n\n", "b"]),
        ("qwen35", "हिन्दी x", ["हिन्दी", " x"]),
        ("hunyuan", "12 ab", ["1", "2", " ab"]),
    ],
)
def test_words_of_a_name(name, text, words):
    assert pieces(of_name(name), text) == words


def converted(folder, name):
    """The tokenizer.json of a model that was converted from a file with this name."""
    described = {"normalizer": {"type": "NFC"}, "model": {"type": "BPE", "ignore_merges": False}}
    described["pre_tokenizer"] = gguf_splits.pre_tokenizer(["legacy"])
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text(json.dumps({"gguf_tokenizer_pre": name}))
    gguf.correct_tokenizer(folder)
    return json.loads((folder / "tokenizer.json").read_text())


def test_a_converted_tokenizer_is_corrected(tmp_path):
    fields = converted(tmp_path, "tekken")
    assert fields["pre_tokenizer"] == gguf_splits.pre_tokenizer(gguf_splits.SPLITS["tekken"])
    assert fields["model"]["ignore_merges"]
    assert fields["normalizer"] is None


@pytest.mark.parametrize("name", ["llama-bpe", None])
def test_what_the_converter_knows_stays(tmp_path, caplog, name):
    assert converted(tmp_path, name)["pre_tokenizer"] == gguf_splits.pre_tokenizer(["legacy"])
    assert not caplog.records


def test_an_unknown_name_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "engine"):
        assert converted(tmp_path, "made-up")["pre_tokenizer"] == gguf_splits.pre_tokenizer(["legacy"])
    assert "'made-up'" in caplog.text
