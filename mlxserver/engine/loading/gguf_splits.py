"""Words that a tokenizer of a GGUF file splits a text into before it merges bytes, by the file's tokenizer.ggml.pre.

The names, and what each of them means, are those of llama.cpp (src/llama-vocab.cpp). Where it replaces a class of
letters by what its own regular expressions can say, the table has that of the models' tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# What the converter splits right (gguf2mlx), and what has no words: those vocabularies are not of bytes.
CONVERTED = frozenset(
    {"gpt-2", "gpt2", "llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "gemma4"}
)
# Names of words that are tokens whether or not merges lead to them.
IGNORE_MERGES = frozenset({"falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "minicpm5", "tekken"})

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_CHINESE = r"\x{4e00}-\x{9fa5}"
_CHINESE_OR_KANA = rf"[{_CHINESE}\x{{3040}}-\x{{309f}}\x{{30a0}}-\x{{30ff}}]+"
_EAST_ASIAN = rf"[{_CHINESE}\x{{0800}}-\x{{4e00}}\x{{ac00}}-\x{{d7ff}}]+"
_GPT2 = "|".join(["'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", _SIGNS, _BLANKS])
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_BY_LINE = r"[^\n]+|\n+"


def _words(digits: str, *, letters: str = r"\p{L}", signs: str = r"[\r\n]*", endings: str = _ENDINGS) -> str:
    """Words with the sign before them, digits, signs with what follows, and blanks."""
    others = rf" ?[^\s{letters}\p{{N}}]+{signs}"
    return "|".join(filter(None, [endings, rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+", digits, others, _LINES, _BLANKS]))


def _cased_words(digits: str, *, endings: str = "", signs: str = r"[\r\n/]*", unlike: str = "") -> str:
    """Words that end before a capital letter behind small ones. unlike: letters that are not of any word."""
    high, low = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{unlike}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{unlike}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = [f"{start}{high}*{low}+{endings}", f"{start}{high}+{low}*{endings}"]
    return "|".join([*words, digits, f"{_SIGNS}{signs}", _LINES, _BLANKS])


_CASED = _cased_words(r"\p{N}{1,3}", endings=f"{_ENDINGS}?")
_DEEPSEEK_WORDS = "|".join(
    [
        r"[!-/:-@\[-`{-~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _LINES,
        _BLANKS,
    ]
)
_HAN = r"&&[^\p{Han}]"

# Regular expressions that split a text one after the other; what is between two matches is a piece, too.
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe modern-bert", (_GPT2,)),
    ("gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling", (_GPT2,)),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (r"\p{N}", _GPT2)),
    ("falcon", (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}")),
    ("default", (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    ("falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 chatglm-bpe", (_words(r"\p{N}{1,3}"),)),
    ("stablelm2 hunyuan solar-open megrez grok-2 bailingmoe bailingmoe2 llada-moe", (_words(r"\p{N}"),)),
    ("qwen35", (_words(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    ("ufakzeka", (_words(r"\p{N}", endings=""),)),
    ("seed-coder", (_words(r"\p{N}", signs=""),)),
    ("laguna", (_BY_LINE, _words(r"\p{N}"))),
    ("minicpm5", (r"\p{N}{1,3}", _words(r"\p{N}+"))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", (_CASED,)),
    ("tekken", (_cased_words(r"\p{N}"),)),
    ("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", _CASED)),
    (
        "kimi-k2",
        (r"\p{Han}+", _cased_words(r"\p{N}{1,3}", endings=f"{_ENDINGS}?", signs=r"[\r\n]*", unlike=_HAN)),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", (r"\p{N}{1,3}", _CHINESE_OR_KANA, _DEEPSEEK_WORDS)),
    ("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    (
        "deepseek-llm",
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
            r"\s+$",
            _EAST_ASIAN,
            r"\p{N}+",
        ),
    ),
    ("bloom gpt3-finnish poro-chat", (_BLOOM,)),
    ("viking", (_BLOOM, r"\p{N}")),
    ("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
)
SPLITS = {name: splits for names, splits in _FAMILIES for name in names.split()}


def pre_tokenizer(splits: Iterable[str]) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json that splits so, and then writes bytes as GPT-2 does."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in splits
    ]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, as_bytes]}


def splits_words(described: Any) -> bool:
    """Whether a pre-tokenizer splits words before it writes bytes, so that a name means something to it."""
    steps = described.get("pretokenizers", [described]) if isinstance(described, dict) else []
    return any(step.get("type") == "ByteLevel" for step in steps)
