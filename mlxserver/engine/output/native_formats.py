"""Native formats: how the readers of calls are set for the model families, and how they write a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.output.argument_types import Signatures
from mlxserver.engine.output.call_reading import CallSink, Reading
from mlxserver.engine.output.named_json_calls import (
    NamedJsonCalls,
    kimi_header,
)
from mlxserver.engine.output.pythonic_calls import PythonicCalls
from mlxserver.engine.output.schema_types import EVERYTHING
from mlxserver.engine.output.tagged_calls import KeyedCalls, TaggedCalls
from mlxserver.engine.output.tool_formats import CallReader, ToolFormat, json_format

Writer = Callable[[str, Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class NoCalls:
    """Reader for a format whose calls are no part of the content: its channels are read before (harmony)."""

    untyped: frozenset[str] = EVERYTHING

    def read(self, sink: CallSink, signatures: Signatures, start: str) -> Reading[None]:
        """Read no call."""
        yield
        raise ValueError("calls of this format are no content")


def native(
    name: str, start: str, end: str, reader: CallReader, *others: str, writer: Writer | None = None
) -> ToolFormat:
    """A format of a model's own."""
    return ToolFormat(start, end, reader, is_native=True, other_starts=others, name=name, writer=writer)


def write_list(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Granite 3 writes it."""
    return f"<|tool_call|>[{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}]"


def _write_deepseek(name: str, arguments: Mapping[str, Any]) -> str:
    call, separator, call_end, end = SEPARATED
    return f"{DEEPSEEK_START}{call}{name}{separator}{json.dumps(arguments, ensure_ascii=False)}{call_end}{end}"


def _write_python(name: str, arguments: Mapping[str, Any]) -> str:
    values = (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value for value in arguments.values()
    )
    written = ", ".join(f"{key}={value!s}" for key, value in zip(arguments, values, strict=True))
    return f"<|tool_call_start|>[{name}({written})]<|tool_call_end|>"


def invoke(prefix: str, end: str) -> TaggedCalls:
    """Reader of `<invoke name="f"> <parameter name="p">value</parameter> </invoke>`, a prefix in each tag."""
    return TaggedCalls(
        (f"<{prefix}invoke", ">"),
        f"</{prefix}invoke>",
        (f"<{prefix}parameter", ">"),
        f"</{prefix}parameter>",
        end,
        untyped=EVERYTHING,
    )


def keyed(suffix: str, prefix: str = "", name_end: str = "", section_end: str = "") -> KeyedCalls:
    """Reader of GLM's calls and those like them, whose tags have something before or behind their names."""
    return KeyedCalls(
        f"<{prefix}tool_call{suffix}>",
        f"</{prefix}tool_call{suffix}>",
        (f"<{prefix}arg_key{suffix}>", f"</{prefix}arg_key{suffix}>"),
        (f"<{prefix}arg_value{suffix}>", f"</{prefix}arg_value{suffix}>"),
        name_end,
        section_end,
    )


def hunyuan(suffix: str) -> ToolFormat:
    """Hunyuan's format, whose tags all end in a suffix."""
    end = f"</tool_calls{suffix}>"
    reader = keyed(suffix, name_end=f"<tool_sep{suffix}>", section_end=end)
    return native("hunyuan", f"<tool_calls{suffix}>", end, reader, f"<tool_call{suffix}>")


def dsml(block: str) -> ToolFormat:
    """DeepSeek's DSML, with the name of the block that holds the calls."""
    end = f"</｜DSML｜{block}>"
    return native("dsml", f"<｜DSML｜{block}>", end, invoke("｜DSML｜", end), "<｜DSML｜invoke")


def functions(end: str, *, breaks: bool) -> TaggedCalls:
    """Reader of `<function=f> <parameter=p>value</parameter> </function>`."""
    return TaggedCalls(("<function=", ">"), "</function>", ("<parameter=", ">"), "</parameter>", end, breaks)


K3_END = "<|close|>tools<|sep|>"
SEPARATED = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>")
M3 = "]<]minimax[>["

HARMONY = native("harmony", "<|channel|>commentary to=", "<|call|>", NoCalls())
DEEPSEEK_START = "<｜tool▁calls▁begin｜>"
DEEPSEEK = native(
    "deepseek",
    DEEPSEEK_START,
    SEPARATED[3],
    NamedJsonCalls(*SEPARATED, has_kinds=True),  # R1 writes them
    SEPARATED[0],
    writer=_write_deepseek,
)
KIMI_K2 = native("kimi_k2", "<|tool_calls_section_begin|>", KIMI[3], NamedJsonCalls(*KIMI, header=kimi_header), KIMI[0])
QWEN_XML = native("qwen3_coder", "<tool_call>", "</tool_call>", functions("</tool_call>", breaks=True), "<function=")
PYTHONIC = native(
    "pythonic", "<|tool_call_start|>", "<|tool_call_end|>", PythonicCalls("<|tool_call_end|>"), writer=_write_python
)
LLAMA = ToolFormat(
    "",
    "",
    PythonicCalls("<|python_end|>", needs_list=True),  # Llama 4's; an object is read as JSON whatever the format
    is_native=True,
    other_starts=("<|python_tag|>", "<|python_start|>"),
    is_guarded=True,
    name="llama",
)
HERMES = json_format("<tool_call>", "</tool_call>", is_json=True, is_native=True, name="json")
