"""The server with faults on demand: real models, batches and threads, which fail when a file asks for it.

A file in the directory $FAULTS, named after a fault, makes it happen once, and is removed by that; a fault of a step
happens within an answer. Until the test removes the file, "wedge" holds a step up, and the engine with it, "hold" all
steps, while requests come and go, and "load" a load, which is a quarter done until then.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Regex, pre_tokenizers  # noqa: E402

import mlx_api_server  # noqa: E402
import model_manager  # noqa: E402
from mlxserver.engine.runners import builder, text  # noqa: E402
from mlxserver.manager import lifecycle, timers  # noqa: E402

FAULTS = Path(os.environ["FAULTS"])
STEPS_BEFORE = 5  # steps of a batch before one may fail
RAISED = {
    "step": ValueError("a fault that was asked for"),
    "memory": RuntimeError("[malloc] Unable to allocate 68719476736 bytes."),
    "memory again": RuntimeError("[malloc] Unable to allocate 68719476736 bytes."),
    "death": SystemExit("a fault that was asked for"),
}


def is_asked_for(fault):
    try:
        (FAULTS / fault).unlink()
    except FileNotFoundError:
        return False
    return True


def panic():
    """What tokenizers do where a regular expression is too much for them: their Rust code panics, with no Exception."""
    pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated").pre_tokenize_str("x" * 60)


class FaultyBatch:
    """A real batch whose steps may fail while a sequence runs."""

    def __init__(self, batch):
        self._batch = batch
        self._steps = 0  # since it was empty

    def __getattr__(self, name):
        return getattr(self._batch, name)

    def decode(self):
        while (FAULTS / "wedge").exists() and not self._batch.is_empty():
            time.sleep(0.01)
        if (FAULTS / "hold").exists():
            time.sleep(0.001)
            return []
        self._steps = 0 if self._batch.is_empty() else self._steps + 1
        tokens = self._batch.decode()
        may_fail = tokens and self._steps > STEPS_BEFORE
        fault = next((fault for fault in RAISED if may_fail and is_asked_for(fault)), None)
        if fault:
            raise RAISED[fault]
        return tokens

    def prefill(self):
        self._batch.prefill()


class FaultyOutput:
    """A real output that can't make text of its second token."""

    def __init__(self, output):
        self._output = output

    def __getattr__(self, name):
        return getattr(self._output, name)

    def feed(self, token):
        if self.completion_tokens:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a fault that was asked for")
        return self._output.feed(token)


def main():
    build = builder.Builder.build
    prepare = text.TextRunner.prepare

    def faulty_build(self, spec, progress=builder.silent, *args, **kwargs):
        while (FAULTS / "load").exists():
            progress("reading", 1, 4)
            time.sleep(0.02)
        built = build(self, spec, progress, *args, **kwargs)
        built.batch = FaultyBatch(built.batch)
        return built

    def faulty_prepare(self, request, ids):
        if is_asked_for("tokenizer"):
            raise KeyError("a fault that was asked for")
        if is_asked_for("panic"):
            panic()
        choices = prepare(self, request, ids)
        return (
            [(sequence, FaultyOutput(output)) for sequence, output in choices]
            if is_asked_for("detokenizer")
            else choices
        )

    builder.Builder.build = faulty_build
    text.TextRunner.prepare = faulty_prepare
    lifecycle.STOP_PATIENCE = 0.2
    timers.FIRST_BACKOFF = 4.0  # longer than a busy machine takes from one request to the next
    model_manager.CLOSE_GRACE = mlx_api_server.THREADS_PATIENCE = 0.5
    return mlx_api_server.main()


if __name__ == "__main__":
    sys.exit(main())
