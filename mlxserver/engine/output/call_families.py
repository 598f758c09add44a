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

from mlxserver.engine.output.argument_types import Signatures
from mlxserver.engine.output.call_reading import CallSink, Reading
from mlxserver.engine.output.gemma_calls import GemmaCalls
from mlxserver.engine.output.named_json_calls import (
    JsonCalls,
    NamedJsonCalls,
    kimi_header,
    mistral_header,
    solar_header,
)
from mlxserver.engine.output.nested_calls import NestedCalls
from mlxserver.engine.output.pythonic_calls import PythonicCalls
from mlxserver.engine.output.schema_types import EVERYTHING
from mlxserver.engine.output.tagged_calls import KeyedCalls, TaggedCalls
from mlxserver.engine.output.tool_formats import CallReader, ToolFormat, json_format, parsed_format

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class Family:
    """A format, and the texts that a template of it contains. parsers: mlx-lm's names of it."""

    format: ToolFormat
    marks: tuple[str, ...]
    parsers: tuple[str, ...] = ()
    is_in_vocabulary: bool = False


@dataclass(frozen=True, slots=True)
class NoCalls:
    """Reader for a format whose calls are no part of the content: its channels are read before (harmony)."""

    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read no call."""
        yield
        raise ValueError("calls of this format are no content")


def _native(name: str, start: str, end: str, reader: CallReader, *others: str) -> ToolFormat:
    return ToolFormat(start, end, reader, is_native=True, other_starts=others, name=name)


def _invoke(prefix: str, end: str) -> TaggedCalls:
    """Reader of `<invoke name="f"> <parameter name="p">value</parameter> </invoke>`, a prefix in each tag."""
    return TaggedCalls(
        (f"<{prefix}invoke", ">"),
        f"</{prefix}invoke>",
        (f"<{prefix}parameter", ">"),
        f"</{prefix}parameter>",
        end,
        untyped=EVERYTHING,
    )


def _keyed(suffix: str, prefix: str = "", name_end: str = "", section_end: str = "") -> KeyedCalls:
    """Reader of GLM's calls and those like them, whose tags have something before or behind their names."""
    return KeyedCalls(
        f"<{prefix}tool_call{suffix}>",
        f"</{prefix}tool_call{suffix}>",
        (f"<{prefix}arg_key{suffix}>", f"</{prefix}arg_key{suffix}>"),
        (f"<{prefix}arg_value{suffix}>", f"</{prefix}arg_value{suffix}>"),
        name_end,
        section_end,
    )


def _hunyuan(suffix: str) -> ToolFormat:
    end = f"</tool_calls{suffix}>"
    reader = _keyed(suffix, name_end=f"<tool_sep{suffix}>", section_end=end)
    return _native("hunyuan", f"<tool_calls{suffix}>", end, reader, f"<tool_call{suffix}>")


def _dsml(block: str) -> ToolFormat:
    end = f"</｜DSML｜{block}>"
    return _native("dsml", f"<｜DSML｜{block}>", end, _invoke("｜DSML｜", end), "<｜DSML｜invoke")


def _functions(end: str, *, breaks: bool) -> TaggedCalls:
    return TaggedCalls(("<function=", ">"), "</function>", ("<parameter=", ">"), "</parameter>", end, breaks)


K3_END = "<|close|>tools<|sep|>"
SEPARATED = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>")
M3 = "]<]minimax[>["

HARMONY = _native("harmony", "<|channel|>commentary to=", "<|call|>", NoCalls())
DEEPSEEK = _native("deepseek", "<｜tool▁calls▁begin｜>", SEPARATED[3], NamedJsonCalls(*SEPARATED), SEPARATED[0])
KIMI_K2 = _native(
    "kimi_k2", "<|tool_calls_section_begin|>", KIMI[3], NamedJsonCalls(*KIMI, header=kimi_header), KIMI[0]
)
QWEN_XML = _native("qwen3_coder", "<tool_call>", "</tool_call>", _functions("</tool_call>", breaks=True), "<function=")
PYTHONIC = _native("pythonic", "<|tool_call_start|>", "<|tool_call_end|>", PythonicCalls("<|tool_call_end|>"))
LLAMA = ToolFormat(
    "",
    "",
    JsonCalls("", ("<|python_tag|>",)),
    is_native=True,
    other_starts=("<|python_tag|>",),
    is_guarded=True,
    name="llama",
)
HERMES = json_format("<tool_call>", "</tool_call>", is_json=True, is_native=True, name="json")

FAMILIES = (
    Family(HARMONY, ("<|channel|>", "<|call|>")),
    Family(_native("minimax_m3", f"{M3}<tool_call>", f"{M3}</tool_call>", NestedCalls(M3)), (M3,)),
    Family(
        _native("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", _invoke("", "</minimax:tool_call>")),
        ("<minimax:tool_call>",),
        ("minimax_m2",),
    ),
    Family(_dsml("function_calls"), ("｜DSML｜", "function_calls>")),
    Family(_dsml("tool_calls"), ("｜DSML｜",)),
    Family(DEEPSEEK, ("<｜tool▁calls▁begin｜>",)),
    Family(
        _native(
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
        _native("gemma4", "<|tool_call>", "<tool_call|>", GemmaCalls("<tool_call|>")),
        ("<|tool_call>", "<tool_call|>"),
        ("gemma4",),
    ),
    Family(
        _native(
            "function_gemma",
            "<start_function_call>",
            "<end_function_call>",
            GemmaCalls("<end_function_call>", mark="<escape>"),
        ),
        ("<start_function_call>",),
        ("function_gemma",),
    ),
    Family(
        _native("longcat", "<longcat_tool_call>", "</longcat_tool_call>", _keyed("", "longcat_")),
        ("<longcat_tool_call>",),
        ("longcat",),
    ),
    Family(
        _native(
            "minicpm5",
            "<function name=",
            "</function>",
            TaggedCalls(("<function name=", ">"), "</function>", ("<param name=", ">"), "</param>", has_cdata=True),
        ),
        ('<function name="', '<param name="'),
        ("minicpm5",),
    ),
    Family(_hunyuan(":opensource"), ("<tool_sep", ":opensource")),
    Family(_hunyuan(""), ("<tool_sep>",)),
    Family(_native("glm", "<tool_call>", "</tool_call>", _keyed("")), ("<arg_key>",), ("glm47", "laguna")),
    Family(
        _native("seed", "<seed:tool_call>", "</seed:tool_call>", _functions("</seed:tool_call>", breaks=False)),
        ("<seed:tool_call>",),
    ),
    Family(PYTHONIC, ("<|tool_list_start|>",)),
    Family(PYTHONIC, ("<|tool_call_start|>",)),
    Family(QWEN_XML, ("<tool_call>", "<function=", "<parameter="), ("qwen3_coder",)),
    Family(
        _native("mistral", "[TOOL_CALLS]", "", NamedJsonCalls("[TOOL_CALLS]", "[ARGS]", header=mistral_header)),
        ("[TOOL_CALLS]",),
        ("mistral",),
    ),
    Family(
        _native("muse", "<atem:function_calls>", "</atem:function_calls>", _invoke("atem:", "</atem:function_calls>")),
        ("<atem:function_calls>",),
        ("muse_spark",),
    ),
    Family(json_format("<|START_ACTION|>", "<|END_ACTION|>", is_native=True, name="cohere"), ("<|START_ACTION|>",)),
    Family(
        _native(
            "apertus",
            "<|tools_prefix|>",
            "<|tools_suffix|>",
            JsonCalls("<|tools_suffix|>", ("<|tools_prefix|>",), is_keyed=True),
        ),
        ("<|tools_prefix|>",),
    ),
    Family(json_format("<TOOLCALL>", "</TOOLCALL>", is_native=True, name="nemotron"), ("<TOOLCALL>",)),
    Family(
        _native(
            "solar",
            "<|tool_call:begin|>",
            "<|tool_call:end|>",
            NamedJsonCalls("<|tool_call:begin|>", "<|tool_call:args|>", "<|tool_call:end|>", header=solar_header),
        ),
        ("<|tool_call:begin|>",),
    ),
    Family(json_format("<|tool_call|>", "<|/tool_call|>", is_native=True, name="phi4"), ("<|/tool_call|>",)),
    Family(json_format("<|tool_call|>", "", is_native=True, name="granite"), ("<|tool_call|>",)),
    Family(json_format("<tool_calls>", "</tool_calls>", is_native=True, name="json_list"), ("<tool_calls>",)),
    Family(HERMES, ("<tool_call>",), ("json_tools",)),
    Family(
        _native("function", "<function=", "</function>", NamedJsonCalls("<function=", ">", "</function>")),
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
