"""Grammar of strict calls whose arguments are JSON behind their function's name, as in [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.output.named_json_calls import (
    ID_MARK,
    KIND,
    SOLAR_NAME,
    NamedJsonCalls,
    kimi_header,
    mistral_header,
    solar_header,
)
from mlxserver.engine.sampling.vocabulary import Vocabulary, in_lark

SOLAR_ID = "/[A-Za-z0-9_-]{1,64}/"  # which Solar's models write before the name
INDEX = "/[0-9]{1,3}/"  # of a call in its answer, which Kimi's models write behind the name
OWN_ID = "/[0-9A-Za-z]{1,32}/"  # of a call, which Mistral Small 3.2 writes behind the name


def named_json_rules(
    reader: NamedJsonCalls, start: str, names: list[str], text: Callable[[int], str], vocabulary: Vocabulary
) -> str:
    """Rules of what comes behind a start tag.

    text: index of a function -> text of the schema of its arguments.
    """
    call, separator, call_end, end = (
        in_lark(vocabulary.split(tag)) if tag else ""
        for tag in (reader.call, reader.separator, reader.call_end, reader.end)
    )
    own_id = f"{SOLAR_ID} {in_lark(vocabulary.split(SOLAR_NAME))} " if reader.header is solar_header else ""
    behind = _behind_name(reader, vocabulary)
    rules = []
    for index, name in enumerate(names):
        header = f"functions.{name}:" if reader.header is kimi_header else name
        forms = [f"{own_id}{in_lark([header])} {behind} {separator} GAP? function{index}j"]
        if reader.has_kinds:
            forms.append(f'{in_lark([KIND])} {separator} {in_lark([name])} "\\n```json\\n" function{index}j "\\n```"')
        rules.append(f"function{index}: ({' | '.join(forms)}) GAP? {call_end}\nfunction{index}j: %json {text(index)}")
    functions = " | ".join(f"function{index}" for index in range(len(names)))
    first = "" if start == reader.call else f"GAP? {call}"
    more = f"(GAP? {call} function)* GAP? {end}" if end else ""
    return "\n".join([f"body: {first} function {more}", f"function: {functions}", *rules])


def _behind_name(reader: NamedJsonCalls, vocabulary: Vocabulary) -> str:
    """What a model writes between a function's name and the separator."""
    if reader.header is kimi_header:
        return INDEX
    return f"({in_lark(vocabulary.split(ID_MARK))} {OWN_ID})?" if reader.header is mistral_header else ""
