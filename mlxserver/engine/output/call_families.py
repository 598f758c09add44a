"""Families of tool formats: what a model's chat template contains -> the format that the model writes.

The template decides, since a model was trained on it; the vocabulary does only where the template is silent.

mlx-lm has parsers for many of these. Ours stand in, because mlx-lm's
- get a call when all of it has come, so that nothing of it can be streamed;
- type values by their spelling: an integer goes through a float, text that spells null becomes null, and the types of
  anyOf, $ref, enum and lists of types are not known (qwen3_coder, glm47, longcat, minimax_m2, minicpm5, muse_spark);
- strip the white space of values (glm47, longcat, minimax_m2, minicpm5, muse_spark);
- lose a call whose value does not fit its type, and the second of two functions in one pair of tags (qwen3_coder);
- take the id for the name, and cut a name at its dot (mistral);
- know no key with `-` or `.` in it, and no null in Python's spelling (gemma4, function_gemma);
- cut text at a quote inside it (pythonic).

mlx-lm's parser is used for a format that is not in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxserver.engine.output.gemma_calls import GemmaCalls
from mlxserver.engine.output.named_json_calls import (
    JsonCalls,
    NamedJsonCalls,
    mistral_header,
    solar_header,
)
from mlxserver.engine.output.native_formats import (
    DEEPSEEK,
    HARMONY,
    HERMES,
    K3_END,
    KIMI_K2,
    LLAMA,
    M3,
    PYTHONIC,
    QWEN_XML,
    dsml,
    functions,
    hunyuan,
    invoke,
    keyed,
    native,
    write_list,
)
from mlxserver.engine.output.nested_calls import NestedCalls
from mlxserver.engine.output.tagged_calls import TaggedCalls
from mlxserver.engine.output.tool_formats import ToolFormat, json_format, parsed_format

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class Family:
    """A format, and the texts that a template of it contains. parsers: mlx-lm's names of it."""

    format: ToolFormat
    marks: tuple[str, ...]
    parsers: tuple[str, ...] = ()
    is_in_vocabulary: bool = False


FAMILIES = (
    Family(HARMONY, ("<|channel|>", "<|call|>")),
    Family(native("minimax_m3", f"{M3}<tool_call>", f"{M3}</tool_call>", NestedCalls(M3)), (M3,)),
    Family(
        native("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", invoke("", "</minimax:tool_call>")),
        ("<minimax:tool_call>",),
        ("minimax_m2",),
    ),
    Family(dsml("function_calls"), ("｜DSML｜", "function_calls>")),
    Family(dsml("tool_calls"), ("｜DSML｜",)),
    Family(DEEPSEEK, ("<｜tool▁calls▁begin｜>",)),
    Family(
        native(
            "kimi_k3",
            "<|open|>tools<|sep|>",
            K3_END,
            TaggedCalls(
                ("<|open|>call", "<|sep|>"),
                "<|close|>call<|sep|>",
                ("<|open|>argument", "<|sep|>"),
                "<|close|>argument<|sep|>",
                K3_END,
            ),
        ),
        ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
        ("kimi_k3",),
        is_in_vocabulary=True,
    ),
    Family(KIMI_K2, ("<|tool_calls_section_begin|>",), ("kimi_k2",)),
    Family(
        native("gemma4", "<|tool_call>", "<tool_call|>", GemmaCalls("<tool_call|>")),
        ("<|tool_call>", "<tool_call|>"),
        ("gemma4",),
    ),
    Family(
        native(
            "function_gemma",
            "<start_function_call>",
            "<end_function_call>",
            GemmaCalls("<end_function_call>", mark="<escape>"),
        ),
        ("<start_function_call>",),
        ("function_gemma",),
    ),
    Family(
        native("longcat", "<longcat_tool_call>", "</longcat_tool_call>", keyed("", "longcat_")),
        ("<longcat_tool_call>",),
        ("longcat",),
    ),
    Family(
        native(
            "minicpm5",
            "<function name=",
            "</function>",
            TaggedCalls(("<function name=", ">"), "</function>", ("<param name=", ">"), "</param>", has_cdata=True),
        ),
        ('<function name="', '<param name="'),
        ("minicpm5",),
    ),
    Family(hunyuan(":opensource"), ("<tool_sep", ":opensource")),
    Family(hunyuan(""), ("<tool_sep>",)),
    Family(native("glm", "<tool_call>", "</tool_call>", keyed("")), ("<arg_key>",), ("glm47", "laguna")),
    Family(
        native("seed", "<seed:tool_call>", "</seed:tool_call>", functions("</seed:tool_call>", breaks=False)),
        ("<seed:tool_call>",),
    ),
    Family(PYTHONIC, ("<|tool_list_start|>",)),
    Family(PYTHONIC, ("<|tool_call_start|>",)),
    Family(QWEN_XML, ("<tool_call>", "<function=", "<parameter="), ("qwen3_coder",)),
    Family(
        native("mistral", "[TOOL_CALLS]", "", NamedJsonCalls("[TOOL_CALLS]", "[ARGS]", header=mistral_header)),
        ("[TOOL_CALLS]",),
        ("mistral",),
    ),
    Family(
        native("muse", "<atem:function_calls>", "</atem:function_calls>", invoke("atem:", "</atem:function_calls>")),
        ("<atem:function_calls>",),
        ("muse_spark",),
    ),
    Family(json_format("<|START_ACTION|>", "<|END_ACTION|>", is_native=True, name="cohere"), ("<|START_ACTION|>",)),
    Family(
        native(
            "apertus",
            "<|tools_prefix|>",
            "<|tools_suffix|>",
            JsonCalls("<|tools_suffix|>", ("<|tools_prefix|>",), is_keyed=True),
        ),
        ("<|tools_prefix|>",),
    ),
    Family(json_format("<TOOLCALL>", "</TOOLCALL>", is_native=True, name="nemotron"), ("<TOOLCALL>",)),
    Family(
        native(
            "solar",
            "<|tool_call:begin|>",
            "<|tool_call:end|>",
            NamedJsonCalls("<|tool_call:begin|>", "<|tool_call:args|>", "<|tool_call:end|>", header=solar_header),
        ),
        ("<|tool_call:begin|>",),
    ),
    Family(json_format("<|tool_call|>", "<|/tool_call|>", is_native=True, name="phi4"), ("<|/tool_call|>",)),
    Family(json_format("<|tool_call|>", "", is_native=True, name="granite", writer=write_list), ("<|tool_call|>",)),
    Family(json_format("<|function_call|>", "", is_json=True, is_native=True, name="gigachat"), ("<|function_call|>",)),
    Family(json_format("<tool_calls>", "</tool_calls>", is_native=True, name="json_list"), ("<tool_calls>",)),
    Family(HERMES, ("<tool_call>",), ("json_tools",)),
    Family(
        native("function", "<function=", "</function>", NamedJsonCalls("<function=", ">", "</function>")),
        ("<function=",),
    ),
    Family(LLAMA, ('{"name": function name, "parameters"',)),
    Family(PYTHONIC, ("<|tool_call_start|>", "<|tool_call_end|>"), ("pythonic",), is_in_vocabulary=True),
)


def find_format(tokenizer: TokenizerWrapper, template: str) -> ToolFormat | None:
    """The format in which a model writes its calls; None where neither template nor vocabulary has one."""
    for family in FAMILIES:
        if not family.is_in_vocabulary and all(mark in template for mark in family.marks):
            return family.format
    vocabulary = tokenizer.get_vocab()
    for family in FAMILIES:
        if family.is_in_vocabulary and all(mark in vocabulary for mark in family.marks):
            return family.format
    return _parsed_format(tokenizer)


def _parsed_format(tokenizer: TokenizerWrapper) -> ToolFormat | None:
    """The format of the parser that mlx-lm has chosen by the tokenizer's configuration."""
    if not tokenizer.has_tool_calling:
        return None
    name = tokenizer.tool_parser.__module__.rpartition(".")[2]
    known = next((family.format for family in FAMILIES if name in family.parsers), None)
    return known or parsed_format(tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser)
