"""Small real models, made once a run (tools/harness/models.py)."""

import signal

from mlxserver.engine.mlx import mx

import pytest
from hypothesis import settings
from mlx_lm.tokenizer_utils import load as load_tokenizer

from tests.support.scripts import SCRIPTS
from tools.harness.models import scripted_model, tiny_llama


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What passes, passes again: MLX's own seed is the time."""
    mx.random.seed(0)


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


@pytest.fixture
def without_compilation():
    """Compiled functions run as they are written: their shapes would cost seconds of the C++ compiler each."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# A shell's background jobs ignore Ctrl-C, and so would the programs that are started here to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing is timed in a test: a machine that is busy for a moment must not fail one. And what passes, passes again: new
# examples are looked for on purpose, with --hypothesis-profile=search.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=5000)
settings.load_profile("repeatable")
