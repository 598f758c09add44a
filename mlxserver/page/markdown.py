"""Markdown of a model's answer as HTML that is safe to show, whatever the text is.

Rule 1: HTML in the text is text.
Rule 2: a link leads to http, https or mailto, or it is text; nothing is fetched: an image is a link to it.
Rule 3: the tags and attributes are those of the renderers below alone; there are no ids, styles or scripts.
Rule 4: a text takes a bounded time, whatever it is; one over the limits stays as it was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html import escape
from time import thread_time
from typing import Any, TypeVar
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import format
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

T = TypeVar("T")

SCHEMES = {"http", "https", "mailto"}
MAX_HIGHLIGHTED = 10_000  # characters of a code block with colours: a lexer may take a quadratic time for one token
COLOUR_SECONDS = 0.5  # of CPU for the code of a text; what has no colours by then stays without
TEXT_SECONDS = 0.5  # of CPU for the rest of a text; prose of MAX_TEXT characters takes a third of it
TOTAL_SECONDS = 2.0  # of CPU for all texts of a request
MAX_TEXT = 50_000  # characters; the time of hostile text grows with the square of its length
LIMIT = "limit"  # of the time for a text, by thread_time(), in the parser's environment
COLOUR_LIMIT = "colour_limit"
LINK = {"rel": "noopener noreferrer nofollow", "target": "_blank"}


class Renderer(RendererHTML):
    """HTML of the page: code with a header, links that open elsewhere, images as links."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """A code block, with the name of its language."""
        language = (tokens[idx].info.split() or [""])[0][:30]
        return code_block(tokens[idx].content, language, env.get(COLOUR_LIMIT, math.inf))

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """An indented code block."""
        return code_block(tokens[idx].content, "")

    def link_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """The start of a link."""
        token = tokens[idx]
        token.attrs = {"href": token.attrs.get("href", ""), **LINK}
        return self.renderToken(tokens, idx, options, env)

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """A link to an image, with its description."""
        source, description = str(tokens[idx].attrs.get("src", "")), tokens[idx].content or "image"
        attributes = "".join(f' {name}="{value}"' for name, value in LINK.items())
        return f'<a href="{escape(source)}"{attributes}>{escape(description)}</a>'

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        """The start of a cell; its alignment is a class, for the page takes no styles in attributes."""
        token = tokens[idx]
        alignment = str(token.attrs.pop("style", "")).partition(":")[2]
        if alignment in ("left", "right", "center"):
            token.attrs["class"] = alignment
        return self.renderToken(tokens, idx, options, env)

    td_open = th_open


class _TooSlow(Exception):
    """The time for a text, or for its colours, is over."""


def code_block(code: str, language: str, end: float = math.inf) -> str:
    """A code block in colours, as far as its language is known. end: of the time for them, by thread_time()."""
    label = f'<span class="lang">{escape(language)}</span>' if language else ""
    return f'<div class="code">{label}<pre><code>{_coloured(code, language, end)}</code></pre></div>\n'


def render_texts(texts: Iterable[str]) -> list[str]:
    """The HTML of each text. Those that are left when the time for all is over stay as they are."""
    end = thread_time() + TOTAL_SECONDS
    return [render(text, end) for text in texts]


def render(text: str, end: float = math.inf) -> str:
    """The HTML of a Markdown text. One that is longer than the limit, or takes longer, stays as it is.

    end: of the time for it, by thread_time().
    """
    if len(text) > MAX_TEXT:
        return _plain(text)
    parser, environment = _parser(), {LIMIT: min(end, thread_time() + TEXT_SECONDS)}
    try:
        tokens = parser.parse(text, environment)
    except _TooSlow:
        return _plain(text)
    environment[COLOUR_LIMIT] = min(end, thread_time() + COLOUR_SECONDS)
    return str(parser.renderer.render(tokens, parser.options, environment))


def is_safe_link(url: str) -> bool:
    """Whether a link may stay one."""
    try:
        return urlsplit(url.strip()).scheme.lower() in SCHEMES
    except ValueError:
        return False


def _coloured(code: str, language: str, end: float) -> str:
    if not language or len(code) > MAX_HIGHLIGHTED:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(code)
    try:
        return str(format(_until(end, lexer.get_tokens(code)), HtmlFormatter(nowrap=True)))
    except _TooSlow:
        return escape(code)


def _until(end: float, tokens: Iterable[T]) -> Iterator[T]:
    """The tokens. Raises _TooSlow once the time is over."""
    for token in tokens:
        if thread_time() > end:
            raise _TooSlow
        yield token


def _plain(text: str) -> str:
    return f'<div class="plain-text">{escape(text)}</div>'


def _in_time(state: Any, *_: Any) -> bool:
    """A rule of the parser that matches nothing. Raises _TooSlow once the time for the text is over."""
    if thread_time() > state.env[LIMIT]:
        raise _TooSlow
    return False


@cache
def _parser() -> Any:
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=Renderer).enable(["table", "strikethrough"])
    parser.validateLink = is_safe_link  # type: ignore[method-assign]
    for rules in (parser.block.ruler, parser.inline.ruler):
        rules.before(rules.get_all_rules()[0], "in_time", _in_time)
    return parser
