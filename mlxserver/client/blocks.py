"""Markdown that is still being written: which of its blocks are complete. Pure.

Rule: a block is complete when a complete line has begun the next one. CommonMark reads line by line, and no later
      line changes a block that is closed, so a complete block can be printed once and for all.
"""

from __future__ import annotations

from itertools import pairwise

from markdown_it import MarkdownIt

# The parser that rich renders with.
PARSER = MarkdownIt().enable("strikethrough").enable("table")


def split_blocks(text: str) -> tuple[list[str], str]:
    """The complete blocks of a text, and the rest that may still change. Together they are the text."""
    lines = text.split("\n")
    whole = lines[:-1]
    # A carriage return alone would be a line to the parser, and the lines are counted by line feeds here.
    tokens = PARSER.parse("\n".join(whole).replace("\r", " ")) if whole else []
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    cuts = [0, *starts[1:]]
    blocks = ["".join(f"{line}\n" for line in lines[cut:end]) for cut, end in pairwise(cuts)]
    return blocks, "\n".join(lines[cuts[-1] :])


def split_lines(text: str) -> tuple[list[str], str]:
    """The same for plain text: every complete line is a block."""
    *lines, rest = text.split("\n")
    return lines, rest
