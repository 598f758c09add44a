"""Grammar of strict calls whose arguments are JSON behind their function's name, as in [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.output.named_json_calls import NamedJsonCalls, kimi_header, solar_header
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

INDEX = "/[0-9]{1,3}/"  # of a call in its answer, which Kimi's models write behind the name


def named_json_rules(
    reader: NamedJsonCalls, start: str, names: list[str], text: Callable[[int], str], vocabulary: Vocabulary
) -> str | None:
    """Rules of what comes behind a start tag; None where a call has more than a name and arguments.

    text: index of a function -> text of the schema of its arguments.
    """
    if reader.header is solar_header:
        return None
    call, separator, call_end, end = (
        in_lark(vocabulary.split(tag)) if tag else ""
        for tag in (reader.call, reader.separator, reader.call_end, reader.end)
    )
    rules = []
    for index, name in enumerate(names):
        header = f"functions.{name}:" if reader.header is kimi_header else name
        number = INDEX if reader.header is kimi_header else ""
        rules.append(
            f"function{index}: {in_lark([header])} {number} {separator} GAP? function{index}j GAP? {call_end}\n"
            f"function{index}j: %json {text(index)}"
        )
    functions = " | ".join(f"function{index}" for index in range(len(names)))
    first = "" if start == reader.call else f"GAP? {call}"
    more = f"(GAP? {call} function)* GAP? {end}" if end else ""
    return "\n".join([f"body: {first} function {more}", f"function: {functions}", *rules])
