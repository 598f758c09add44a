"""Fill-in-the-middle prompts: the marks of a tokenizer's vocabulary, in the order of the family's makers."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.prompt.fill_in_middle import MARKS, FillInMiddle

FAMILIES = [
    ("<|fim_prefix|>def<|fim_suffix|>end<|fim_middle|>", False),  # Qwen-Coder
    ("<fim_prefix>def<fim_suffix>end<fim_middle>", False),  # StarCoder
    ("<[fim-suffix]>end<[fim-prefix]>def<[fim-middle]>", False),  # Seed-Coder
    ("<s>▁<PRE>▁def▁<SUF>end▁<MID>", True),  # CodeLlama: a space before the prefix, none before the suffix
    ("<s><｜fim▁begin｜>def<｜fim▁hole｜>end<｜fim▁end｜>", False),  # DeepSeek-Coder
    ("<s>[SUFFIX]end[PREFIX]▁def", True),  # Codestral
]


def make_tokenizer(marks, *, is_spaced=False, has_bos=False):
    """A tokenizer of single characters; is_spaced: it begins a text with a space, as SentencePiece does."""
    characters = ["<unk>", "<s>", "</s>", "▁", "☺", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.BPE({text: id for id, text in enumerate(characters)}, [], unk_token="<unk>"))
    prepend = [normalizers.Prepend("▁")] if is_spaced else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    core.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if has_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    whole = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TokenizerWrapper(whole)


def marks_of(expected):
    return next(marks for marks in MARKS if all(mark in expected for mark in marks.needed))


@pytest.mark.parametrize(("expected", "is_spaced"), FAMILIES)
def test_a_prompt_has_the_parts_in_the_order_of_the_makers(expected, is_spaced):
    marks = marks_of(expected)
    tokenizer = make_tokenizer((*marks.needed, *marks.ends), is_spaced=is_spaced, has_bos=expected.startswith("<s>"))
    prompt = FillInMiddle(tokenizer).format("def", "end")
    pieces = tokenizer.convert_ids_to_tokens(list(prompt.tokens))
    assert "".join(pieces) == expected
    assert set(tokenizer.convert_ids_to_tokens(list(prompt.ends))) == {*marks.needed, *marks.ends}


def test_an_empty_part_adds_nothing_to_its_mark():
    tokenizer = make_tokenizer(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
    prompt = FillInMiddle(tokenizer).format("", "e")
    assert tokenizer.convert_ids_to_tokens(list(prompt.tokens)) == ["<fim_prefix>", "<fim_suffix>", "e", "<fim_middle>"]


def test_a_model_without_the_marks_can_t_fill_in():
    fill_in_middle = FillInMiddle(make_tokenizer(("<fim_prefix>", "<fim_suffix>")))
    assert fill_in_middle.marks is None
    with pytest.raises(PromptRejected, match="no tokens to fill in the middle") as caught:
        fill_in_middle.format("a", "b")
    assert caught.value.param == "suffix"


def test_what_is_no_text_is_refused_where_it_stands():
    fill_in_middle = FillInMiddle(make_tokenizer(("<fim_prefix>", "<fim_suffix>", "<fim_middle>")))
    for parts, param in ((("\ud800", "b"), "prompt"), (("a", "\ud800"), "suffix")):
        with pytest.raises(PromptRejected) as caught:
            fill_in_middle.format(*parts)
        assert caught.value.param == param
