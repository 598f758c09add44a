"""Servers whose end is checked."""

import signal
from contextlib import contextmanager

from tools.harness.running_server import running_server


def assert_clean(ended):
    assert ended.status == 0, ended.stderr
    for sign_of_trouble in ("Traceback", "terminate called", "never retrieved", "never awaited"):
        assert sign_of_trouble not in ended.stderr, ended.stderr


@contextmanager
def clean_server(*flags, number=signal.SIGTERM):
    """A server that logs warnings. number: the signal that ends it, which it does cleanly."""
    with running_server(*flags, "--log-level", "warning") as server:
        yield server
        assert_clean(server.stop(number))
