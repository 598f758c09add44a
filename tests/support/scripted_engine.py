"""A scripted batch at the Batch seam, for what a real model can't show on demand: a gate, a crash, a lasting load.

Each sequence has the tokens 0, 1, 2, ... without end; each is published as its number. A message that starts with
"refuse" is rejected by prepare(), one with "break" makes it fail in an unplanned way; one with "garble" makes its
output fail at its third token, one with "bind" its constraint. One that ends in "!" fails with a Panic.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.errors import EngineError, PromptRejected
from mlxserver.engine.events import Delta, Finish, PromptProgress
from mlxserver.engine.metrics import EngineLoad
from mlxserver.engine.requests import GenerationRequest, ModelFacts
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.engine import Engine
from tests.support.conversations import question

DEADLINE = 100.0  # seconds after which anything counts as hung, on a busy machine too
ENDLESS = 10**9
FACTS = ModelFacts("instruction", 1000, 12345)


def within_deadline(test):
    """Run an async test; it fails if it hangs."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        return asyncio.run(asyncio.wait_for(test(*args, **kwargs), DEADLINE))

    return run


def request(text="hello", max_tokens=None):
    return GenerationRequest(question(text), max_tokens=max_tokens)


async def read(generation):
    """All events after Accepted."""
    events = []
    while arrived := await generation.events():
        events += arrived
    return events


async def ended(generation):
    """How many events came, or the error instead."""
    try:
        await generation.accepted()
        return len(await read(generation))
    except EngineError as error:
        return error


async def until(condition):
    while not condition():  # noqa: ASYNC110  (it may come true on another thread)
        await asyncio.sleep(0.001)


class Death(BaseException):
    """An error that no engine thread survives."""


class Panic(BaseException):
    """Like the panics of tokenizers and grammars, which are written in Rust: it is no Exception."""


class Knot:
    """A constraint that fails at its third token."""

    def __init__(self, fault):
        self._fault = fault
        self._accepted = 0

    def allowed(self):
        return None

    def accept(self, token):
        self._accepted += 1
        if self._accepted > 2:
            raise self._fault("a knot in the grammar")


class Numbers:
    """An output whose text is each token's number; finishes at max_tokens."""

    def __init__(self, max_tokens, index, fault=None):
        self._fault = fault
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._max_tokens = max_tokens
        self._index = index

    def feed(self, token):
        self.completion_tokens += 1
        if self._fault and self.completion_tokens > 2:
            raise self._fault("no such token")
        yield Delta(str(token.token), index=self._index)
        if self.completion_tokens == self._max_tokens:
            yield Finish("length", self._index)


@dataclass
class ScriptedBatch:
    """Sequences that count once they have one of `slots`.

    While `gate` is closed, decode() waits at it, as in a long step. It raises the next of `faults`, if any, and `crash`
    each time.
    """

    sequences: dict = field(default_factory=dict)
    running: set = field(default_factory=set)
    requests: dict = field(default_factory=dict)
    load: EngineLoad = field(default_factory=EngineLoad)
    prompts: dict = field(default_factory=dict)
    constraints: dict = field(default_factory=dict)
    slots: int = 10**6
    gate: threading.Event = field(default_factory=threading.Event)
    faults: list = field(default_factory=list)
    crash: BaseException | None = None
    restarts: int = 0
    is_closed: bool = False
    thread: threading.Thread | None = None

    def __post_init__(self):
        self.gate.set()

    def insert(self, sequences):
        self.sequences |= {sequence.id: 0 for sequence in sequences}
        self.requests |= {sequence.id: sequences[0].id for sequence in sequences}
        self.prompts |= {sequence.id: sequence.progress or PromptProgress() for sequence in sequences}
        self.constraints |= {sequence.id: sequence.constraint for sequence in sequences if sequence.constraint}

    def remove(self, sequence_ids):
        for sequence_id in sequence_ids:
            self.sequences.pop(sequence_id, None)
            self.running.discard(sequence_id)
        self.note_load()

    def decode(self):
        self.thread = threading.current_thread()
        if self.sequences:
            time.sleep(0.0005)  # a step takes a while; without it an endless sequence floods the event loop
            assert self.gate.wait(DEADLINE)
        if self.running and self.faults:
            raise self.faults.pop(0)
        if self.running and self.crash:
            raise self.crash
        tokens = [
            SampledToken(sequence_id, number)
            for sequence_id, number in self.sequences.items()
            if sequence_id in self.running
        ]
        for token in tokens:
            self.sequences[token.sequence_id] += 1
            if token.sequence_id in self.constraints:
                self.constraints[token.sequence_id].accept(token.token)
        return tokens

    def waiting(self):
        return self.sequences.keys() - self.running

    def restart(self, staying):
        self.restarts += 1
        self.running.clear()
        self.note_load()
        self.sequences = {
            sequence_id: number for sequence_id, number in self.sequences.items() if sequence_id in staying
        }
        return []

    def prefill(self):
        waiting = [sequence_id for sequence_id in self.sequences if sequence_id not in self.running]
        for sequence_id in waiting[: self.slots - len(self.running)]:
            self.running.add(sequence_id)
            self.prompts[sequence_id].state = None
        self.note_load()

    def note_load(self):
        self.load.num_running = len({self.requests[sequence_id] for sequence_id in self.running})

    def is_empty(self):
        return not self.sequences

    def close(self):
        self.is_closed = True


@dataclass
class ScriptedLaunches(ScriptedBatch):
    """Each step is launched before it goes on as in a scripted batch."""

    before_launch: Callable = field(default=lambda: None)
    launched: int = 0

    def decode(self):
        if self.running:
            self.before_launch()
            self.launched += 1
        return super().decode()


@dataclass
class ScriptedRunner:
    """While `formatting` is clear preprocess() of a JSON request waits, as for a large schema; "refuse" is rejected.

    preprocess() and answer() raise `panic`, if any. asked: the requests and questions that came.
    """

    batch: ScriptedBatch = field(default_factory=ScriptedBatch)
    facts: ModelFacts = FACTS
    formatting: threading.Event = field(default_factory=threading.Event)
    panic: BaseException | None = None
    asked: list = field(default_factory=list)
    idle_steps: Iterator = field(default_factory=lambda: iter(()))

    def __post_init__(self):
        self.formatting.set()

    def preprocess(self, request):
        self.asked.append(request)
        if self.panic:
            raise self.panic
        if request.format:
            assert self.formatting.wait(DEADLINE)
            if request.prompt.conversation[0].text.startswith("refuse"):
                raise PromptRejected("no such schema", "format.schema")
        return request

    def prepare(self, request, ids):
        text = request.prompt.conversation[0].text
        if text.startswith("refuse"):
            raise PromptRejected("refused", "messages[0]")
        fault = Panic if text.endswith("!") else ZeroDivisionError
        if text.startswith("break"):
            raise fault("an unplanned fault")
        max_tokens = request.max_tokens or ENDLESS
        tokens = tuple(range(len(text)))
        return [
            (
                Sequence(
                    next(ids),
                    tokens,
                    SamplingParams(),
                    max_tokens,
                    constraint=Knot(fault) if text.startswith("bind") else None,
                ),
                Numbers(max_tokens, index, fault if text.startswith("garble") else None),
            )
            for index in range(request.n)
        ]

    def answer(self, question):
        self.asked.append(question)
        if self.panic:
            raise self.panic
        return "answer"


@dataclass
class Factory:
    """Makes scripted engines. While `gate` is closed a load goes on, and reports its progress if it `reports`; a load
    raises the next of `failures`, if any.

    Starting an engine raises the next of `start_failures`, if any.
    """

    gate: threading.Event = field(default_factory=threading.Event)
    failures: list = field(default_factory=list)
    start_failures: list = field(default_factory=list)
    runners: list = field(default_factory=list)
    engines: list = field(default_factory=list)
    specs: list = field(default_factory=list)
    builds: int = 0
    reports: bool = True
    make_batch: Callable = ScriptedBatch

    def __post_init__(self):
        self.gate.set()

    @property
    def batch(self):
        """The batch of the engine that was loaded last."""
        return self.runners[-1].batch

    def build(self, loading=None):
        self.builds += 1
        while not self.gate.wait(0.005):  # a load can be called off, at its next report
            if loading and self.reports:
                loading("reading", 1, 2)
        if self.failures:
            raise self.failures.pop(0)
        self.runners.append(ScriptedRunner(self.make_batch()))
        return self.runners[-1]

    def start(self, spec, on_death, loading, metrics):
        if self.start_failures:
            raise self.start_failures.pop(0)
        self.specs.append(spec)
        self.engines.append(Engine(spec.key, lambda: self.build(loading), on_death=on_death, metrics=metrics))
        return self.engines[-1]
