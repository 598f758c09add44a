"""The progress of a prompt, as the event loop may read it at any time: its place in the queue, then its tokens."""

from dataclasses import replace

import pytest
from mlx_lm import load

from mlxserver.engine.events import PrefillProgress, PromptProgress, QueuePosition
from mlxserver.engine.requests import GenerationRequest
from mlxserver.engine.scheduler.prefill import ChunkBudget
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.subscribers import Subscribers
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.conversations import question


@pytest.fixture(scope="module")
def model(tiny_llama_path):
    return load(str(tiny_llama_path))[0]


def watched(id, tokens, **fields):
    """A sequence, and the progress of its prompt."""
    progress = PromptProgress()
    return replace(sequence(id, tokens, **fields), progress=progress), progress


def test_a_prompt_waits_then_is_prefilled_chunk_by_chunk_then_decodes(model):
    scheduler = Scheduler(model, max_running=1)
    first, progress = watched(0, prompt(300))
    second, waiting = watched(1, prompt(50))
    driver = Driver(scheduler, first, second)
    assert progress.state == QueuePosition()
    done = []
    while progress.state is not None:
        scheduler.prefill(ChunkBudget(1.0, 64, 0.001, beside_peers=False))
        done.append(progress.state)
        assert waiting.state == QueuePosition()
    *steps, end = done
    assert end is None
    assert all(isinstance(step, PrefillProgress) and step.total == 300 for step in steps)
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert len(steps) > 2
    driver.finish()
    assert waiting.state is None


def test_a_preempted_sequence_waits_again(model):
    pairs = [watched(n, prompt(40 + 13 * n, seed=n), max_tokens=300) for n in range(6)]
    driver = Driver(Scheduler(model, max_kv_tokens=1200), *[sequence for sequence, _ in pairs])
    driver.until(lambda: any(driver.tokens[n] and pairs[n][1].state == QueuePosition() for n in range(6)))
    driver.finish()
    assert [progress.state for _, progress in pairs] == [None] * 6


def test_a_position_counts_those_that_wait_and_came_earlier():
    subscribers = Subscribers()
    generations = [
        Generation(GenerationRequest(question("hi")), lambda generation: None, subscribers.position) for _ in range(4)
    ]
    for generation in generations:
        subscribers.add(generation)
    assert [generation.progress for generation in generations] == [QueuePosition(n) for n in (1, 2, 3, 4)]
    generations[1].prompt.state = PrefillProgress(5, 10)
    subscribers.deliver(generations[0], is_done=True)
    assert [generation.progress for generation in generations[1:]] == [
        PrefillProgress(5, 10),
        QueuePosition(1),
        QueuePosition(2),
    ]
