"""Markdown as HTML that is safe to show, whatever the text is."""

import re
import time
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.page import markdown
from mlxserver.page.markdown import MAX_HIGHLIGHTED, MAX_TEXT, render, render_texts

TAGS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "s", "a"),
    *("br", "hr", "table", "thead", "tbody", "tr", "th", "td", "div", "span"),
}
ATTRIBUTES = {"class", "href", "rel", "target", "title", "start"}


class Reader(HTMLParser):
    """Tags, attributes and links of a text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.links = set(), set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links += [value for name, value in attributes if name == "href"]


def is_safe(html):
    found = Reader(html)
    schemes = all(re.match("(?i)(https?|mailto):", link.strip()) for link in found.links)
    return found.tags <= TAGS and found.attributes <= ATTRIBUTES and schemes


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        '<img src=x onerror="alert(1)">',
        "[a](javascript:alert(1))",
        "[a](JaVa\tScRiPt:alert(1))",
        "[a](data:text/html,x) ![b](data:image/svg+xml,x) ![c](file:///etc/passwd)",
        "<javascript:alert(1)> <https://a.example>",
        "[a]: javascript:alert(1)\n\n[a]",
        '[a](https://x.example "\\" onclick=1")',
        '```"onmouseover=1 x\n</code></pre><script>\n```',
        "| a |\n| -: |\n| <b onclick=1> |",
        "&lt;script&gt; &#60;script&#62;",
        "[a](//evil.example) [b](/v1/models) [c](page/app.js)",
        "# a {onclick=1}\n<!-- x -->\n<![CDATA[x]]>",
    ],
)
def test_hostile_text_is_harmless(text):
    assert is_safe(render(text))


MARKS = st.sampled_from(
    ["[", "](", ")", "<", ">", "javascript:", "`", "```\n", "*", "|", "\n", "- ", "x", '"', "!", "&#x"]
)


@given(st.lists(MARKS, max_size=40).map("".join))
def test_any_text_is_harmless(text):
    assert is_safe(render(text))


def test_what_people_write_is_shown():
    html = render("# A\n\n**b** ~~c~~ `d`\n\n| e | f |\n| - | -: |\n| 1 | 2 |\n\n3. g\n\n[h](https://i.example)")
    for part in ("<h1>A</h1>", "<strong>b</strong>", "<s>c</s>", "<code>d</code>", '<td class="right">2</td>'):
        assert part in html
    assert '<ol start="3">' in html
    assert '<a href="https://i.example" rel="noopener noreferrer nofollow" target="_blank">h</a>' in html


def test_code_has_colours_where_its_language_is_known():
    assert '<span class="k">def</span>' in render("```python\ndef f(): pass\n```")
    assert "<span class=" not in render("```\ndef f(): pass\n```")
    assert "def f(): &lt;b&gt;" in render("```no-such-language\ndef f(): <b>\n```")


def test_an_image_is_a_link_that_nothing_loads():
    assert render("![a cat](https://x.example/cat.png)").startswith('<p><a href="https://x.example/cat.png"')


def test_a_text_over_the_limit_stays_as_it_is():
    assert render("*a*" * MAX_TEXT).startswith('<div class="plain-text">*a*')
    assert render("<b>" * MAX_TEXT).startswith('<div class="plain-text">&lt;b&gt;')


@pytest.mark.parametrize("text", ["*a* [b](https://c.example)", "> - *a*", "| a |\n| - |\n| *b* |", "# a"])
def test_a_text_that_takes_too_long_stays_as_it_is(monkeypatch, text):
    assert "<div" not in render(text)
    monkeypatch.setattr(markdown, "TEXT_SECONDS", -1)
    assert render(text) == f'<div class="plain-text">{escape(text)}</div>'


def test_the_parser_is_stopped_inside_a_paragraph(monkeypatch):
    """Each opening bracket is tried as the start of a link, to the end of the text."""
    clock = iter(range(1000))
    monkeypatch.setattr(markdown, "TEXT_SECONDS", 100)  # of a clock that moves whenever it is read
    monkeypatch.setattr(markdown, "thread_time", lambda: next(clock))
    assert render("[" * 10_000).startswith('<div class="plain-text">[[[')
    assert next(clock) < 110
    assert render("*a*") == "<p><em>a</em></p>\n"


def test_texts_that_are_left_when_the_time_for_all_is_over_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(markdown, "TEXT_SECONDS", 100)
    monkeypatch.setattr(markdown, "TOTAL_SECONDS", 20)
    clock = iter(range(100))
    monkeypatch.setattr(markdown, "thread_time", lambda: next(clock))
    html = render_texts(["*a*"] * 20)
    assert html[0] == "<p><em>a</em></p>\n"
    assert html[-1] == '<div class="plain-text">*a*</div>'


def test_code_that_a_lexer_is_slow_on_stays_without_colours(monkeypatch):
    """Java's lexer tries each of these words as the start of a method."""
    text = "```java\n" + "a " * (MAX_HIGHLIGHTED // 2 - 1) + "\n```\n"
    began = time.thread_time()
    assert '<span class="n">' not in render(text * 4)
    assert time.thread_time() - began < 10  # half a minute without a limit
    assert '<span class="k">def</span>' in render("```python\ndef f(): pass\n```")  # each text has its own time
    monkeypatch.setattr(markdown, "COLOUR_SECONDS", -1)
    assert "<code>def f(): pass\n</code>" in render("```python\ndef f(): pass\n```")
