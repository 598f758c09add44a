"""The thread that owns one loaded model: it loads the model, then decodes and prefills until it is stopped.

Rule 1: every MLX call for the model (load, step, free) happens on this thread.
Rule 2: the outputs of one step, and the first events of requests, cross to the event loop in one call. Python runs on
        one thread at a time: where a batch tells when it launches a step (worker/batch.py), they cross then, so that
        no stream's bytes delay the step.
Rule 3: messages are taken between a step and a chunk, too: the next request comes while the step behind the last token
        of an answer is computed, and it does not have to wait for one step more.
Rule 4: a fault ends what it concerns and nothing more: a request, a step (worker/recovery.py), the thread.
"""

from __future__ import annotations

import logging
import time
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count

from mlxserver.engine.errors import EngineError, EngineStopped, EngineUnloaded, LoadFailed
from mlxserver.engine.events import Accepted
from mlxserver.engine.metrics import EngineLoad, ModelMetrics
from mlxserver.engine.requests import EngineRequest, GenerationRequest, ModelFacts
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.batch import Batch, LaunchingBatch
from mlxserver.engine.worker.faults import request_failure, without_frames
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.mailbox import Barrier, Cancel, Mailbox, Stop, Submit
from mlxserver.engine.worker.recovery import MOST_IN_A_ROW, Recovery
from mlxserver.engine.worker.runner import PAUSE, Output, Runner
from mlxserver.engine.worker.subscribers import Subscribers
from mlxserver.engine.worker.tokenizer_worker import TokenizerWorker
from mlxserver.engine.worker.tracker import StepOutputs, TrackedRequest, Tracker

log = logging.getLogger("engine")

_PAUSE_SECONDS = 0.5  # between idle steps while other models compute
_QUIET_SECONDS = 0.5  # from the last request to the first idle step: the next turn of an agent may come at once


@dataclass(frozen=True, slots=True)
class EventLoopSide:
    """The event loop's functions, called there from the thread. `call_soon` schedules a call, from any thread."""

    key: str
    call_soon: Callable[..., object]
    subscribers: Subscribers
    on_start: Callable[[ModelFacts], None]
    on_end: Callable[[EngineError], None]
    held: StepOutputs = field(default_factory=list)

    def started(self, facts: ModelFacts) -> None:
        """Report that the model is loaded."""
        self.call(self.on_start, facts)

    def end(self, generation: Generation, error: EngineError | None) -> None:
        """Deliver the end of a generation."""
        self.call(self.subscribers.deliver, generation, [], True, error)

    def deliver_all(self, outputs: StepOutputs) -> None:
        """Deliver the outputs of a step, if there are any."""
        if outputs:
            self.call(self.subscribers.deliver_all, outputs)

    def hold(self, outputs: StepOutputs) -> None:
        """Deliver outputs with the next call, or release(), at the latest."""
        self.held.extend(outputs)

    def release(self) -> None:
        """Deliver what is held."""
        if self.held:
            outputs = self.held.copy()
            self.held.clear()
            self.deliver_all(outputs)

    def ended(self, error: EngineError) -> None:
        """Report that the thread ends."""
        self.call(self.on_end, error)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the event loop, unless it is closed."""
        self.release()
        try:
            self.call_soon(function, *arguments)
        except RuntimeError:  # the loop is closed, and with it every waiter gone
            log.debug("the event loop closed before the engine of %r", self.key)


class EngineThread:
    """What runs on the thread. `load` is the batch's, and may be read on any thread."""

    def __init__(
        self,
        key: str,
        build: Callable[[], Runner],
        free: Callable[[], None],
        stream: Callable[[], AbstractContextManager[object]],
        metrics: ModelMetrics,
        mailbox: Mailbox,
        tokenizer_worker: TokenizerWorker,
        event_loop: EventLoopSide,
    ) -> None:
        self.load = EngineLoad()
        self._key = key
        self._build = build
        self._free = free
        self._stream = stream
        self._mailbox = mailbox
        self._tokenizer_worker = tokenizer_worker
        self._event_loop = event_loop
        self._cross = event_loop.deliver_all
        self._tracker = Tracker(metrics)
        self._recovery = Recovery(self._tracker, self._release, event_loop.deliver_all, metrics)
        self._sequence_ids = count()
        self._idle_steps: Iterator[object] | None = None
        self._is_paused = False  # the last idle step could do nothing
        self._quiet_at = 0.0  # from when on idle steps may begin, by time.monotonic()

    def run(self) -> None:
        """Run until stopped. The one place that catches everything: here the thread ends."""
        error: EngineError = EngineUnloaded(self._key)
        try:
            with self._stream():
                self._serve()
        except EngineError as cause:
            error = without_frames(cause)
        except BaseException as cause:
            log.exception("engine of %r died", self._key)
            error = EngineStopped(self._key, f"{type(cause).__name__}: {cause}")
        finally:
            self._tokenizer_worker.end(error)  # or the tokenizer would live as long as an answer of this engine
            self._release()
            self._event_loop.ended(error)

    def _serve(self) -> None:
        runner = self._load_model()
        self.load = runner.batch.load
        self._tokenizer_worker.begin(runner.preprocess, runner.answer)
        self._event_loop.started(runner.facts)
        batch = runner.batch
        self._idle_steps = runner.idle_steps
        if isinstance(batch, LaunchingBatch):
            batch.before_launch = self._event_loop.release
            self._cross = self._event_loop.hold
        try:
            while self._take_messages(runner, *self._wait(batch)):
                if self._idle_steps and batch.is_empty():
                    self._idle_step()
                    continue
                self._attempt(batch, self._step)
                if not self._take_messages(runner):
                    break
                self._attempt(batch, lambda batch: batch.prefill())
        finally:
            self.load = EngineLoad()
            self._idle_steps = None  # what is left of them holds the batch
            batch.close()

    def _idle_step(self) -> None:
        """Do the next step of idle work. What fails is given up: requests can do without it."""
        assert self._idle_steps
        try:
            for done in self._idle_steps:
                self._is_paused = done is PAUSE
                return
        except EngineError:  # raised by a batch that can't go on
            raise
        except Exception as error:
            log.warning("%s: idle work ends: %s: %s", self._key, type(error).__name__, error)
            self._release()
        self._idle_steps, self._is_paused = None, False

    def _step(self, batch: Batch) -> None:
        tokens = batch.decode()
        self._event_loop.release()
        self._publish(batch, tokens)

    def _publish(self, batch: Batch, tokens: list[SampledToken]) -> None:
        if tokens:
            self._recovery.note_progress()
        outputs, finished = self._tracker.publish(tokens)
        self._cross(outputs)
        if finished:
            batch.remove(finished)
        if batch.is_empty():
            self._event_loop.release()

    def _attempt(self, batch: Batch, work: Callable[[Batch], None]) -> None:
        """Call the batch. If that fails, go on with a fresh one, unless that has not helped either."""
        try:
            work(batch)
            return
        except EngineError:  # raised by a batch that can't go on
            raise
        except Exception as error:
            log.exception("a step of %r failed", self._key)
            cause = without_frames(error)  # they hold KV cache
        self._recovery.after(cause, batch)
        if self._recovery.has_given_up:
            raise EngineStopped(
                self._key, f"{MOST_IN_A_ROW} steps in a row failed, the last with {type(cause).__name__}: {cause}"
            )

    def _take_messages(self, runner: Runner, waits: bool = False, seconds: float | None = None) -> bool:
        """Handle the messages of the event loop; waits for one, for so many seconds at most. False: the end."""
        for message in self._mailbox.take(waits, seconds):
            match message:
                case Submit(generation):
                    self._admit(runner, generation)
                case Cancel(generation):
                    self._drop(runner.batch, generation)
                case Barrier(passed):
                    self._event_loop.call(passed)
                case Stop():
                    return False
        return True

    def _wait(self, batch: Batch) -> tuple[bool, float | None]:
        """Whether to wait for a message, and the most seconds; None: until one comes."""
        now = time.monotonic()
        if not batch.is_empty():
            self._quiet_at = now + _QUIET_SECONDS
            return False, None
        if not self._idle_steps:
            return True, None
        seconds = max(self._quiet_at - now, _PAUSE_SECONDS if self._is_paused else 0.0)
        return seconds > 0, seconds

    def _admit(self, runner: Runner, generation: Generation) -> None:
        try:
            choices = runner.prepare(generation.request, self._sequence_ids)
            tracked = TrackedRequest(generation, _prompt_tokens(generation.request, choices))
            runner.batch.insert(self._tracker.add(tracked, choices))
        except BaseException as error:
            self._drop(runner.batch, generation, request_failure(self._key, error))
            return
        self._cross([(generation, [Accepted(tracked.prompt_tokens)], False, None)])

    def _drop(self, batch: Batch, generation: Generation, error: EngineError | None = None) -> None:
        """Remove a generation from the batch, and deliver its end."""
        try:
            if sequence_ids := self._tracker.forget(generation):
                self._attempt(batch, lambda batch: batch.remove(sequence_ids))
        finally:  # the thread may end over it, and the tracker has forgotten the generation
            self._event_loop.end(generation, error)

    def _load_model(self) -> Runner:
        try:
            return self._build()
        except EngineError:
            raise
        except BaseException as cause:
            log.exception("%r could not be loaded", self._key)
            raise LoadFailed(self._key, f"{type(cause).__name__}: {cause}") from None

    def _release(self) -> None:
        try:
            self._free()
        except Exception:  # the waiters must be notified all the same
            log.exception("the memory of %r could not be released", self._key)


def _prompt_tokens(request: EngineRequest, choices: abc.Sequence[tuple[Sequence, Output]]) -> int:
    """Tokens of a request's prompts: one that all choices share, or a text of each."""
    prompts = choices[:1] if isinstance(request, GenerationRequest) else choices
    return sum(len(sequence.tokens) for sequence, _ in prompts)
