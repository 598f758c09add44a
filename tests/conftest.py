"""Small real models, made once a run (tests/models.py)."""

import engine  # noqa: F401  (first: it prepares the process for MLX)

# isort: split
import signal

import pytest
from hypothesis import settings
from mlx_lm.tokenizer_utils import load as load_tokenizer

from tests.models import scripted_model, tiny_llama
from tests.scripts import Script

SCRIPTS = {
    "hello": "Hello there, and hello there again.",
    "think": "<think>\nTwo and two are four.\n</think>\n\nIt is four.",
    "emoji": Script(["Family: ", b"\xf0\x9f", b"\x91\xa8", b"\xe2\x80", b"\x8d\xf0\x9f\x91\xa9", " end"]),
    "tool": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "forever": Script(["tick ", "tock "], endless=True),
}


@pytest.fixture(scope="session")
def tiny_llama_path(tmp_path_factory):
    """A random llama with ChatML: an instruction model."""
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def scripted_path(tmp_path_factory):
    """A model that says SCRIPTS, picked by a word in the last user message."""
    return scripted_model(tmp_path_factory.mktemp("models") / "scripted", SCRIPTS)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_llama_path):
    return load_tokenizer(tiny_llama_path)


# A shell's background jobs ignore Ctrl-C, and so would the programs that are started here to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing is timed in a test: a machine that is busy for a moment must not fail one. And what passes, passes again: new
# examples are looked for on purpose, with --hypothesis-profile=search.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile("repeatable")
