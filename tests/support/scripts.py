"""Answers of the suite's scripted model, by the word in the last user message."""

from tools.harness.scripts import Script

SCRIPTS = {
    "hello": "Hello there, and hello there again.",
    "think": "<think>\nTwo and two are four.\n</think>\n\nIt is four.",
    "emoji": Script(["Family: ", b"\xf0\x9f", b"\x91\xa8", b"\xe2\x80", b"\x8d\xf0\x9f\x91\xa9", " end"]),
    "tool": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "forever": Script(["tick ", "tock "], endless=True),
}
