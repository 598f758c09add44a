"""Comparison of the engine with mlx-lm alone: the same greedy tokens with the same log-probabilities.

In every way that requests meet: alone, together with prompts of other lengths, joining others, and as a second turn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np
from mlx_lm.generate import generate_step

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine import sequence
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.scheduler import Scheduler
from tools.zoo.models import VOCAB

_LENGTHS = (45, 7, 20, 70)  # tokens of prompts; windows have 32
_ANSWER = 6  # tokens
_CLOSE = 0.02  # nats by which a log-probability may differ; nearer than that, two tokens may change places

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of an answer, and the log-probability of each; margin: how far the second likeliest token was, in nats."""

    tokens: Tokens
    logprobs: tuple[float, ...]
    margins: tuple[float, ...] = ()

    def problem(self, expected: Answer) -> str | None:
        """How it differs from what is expected; None if it does not."""
        for n, token in enumerate(expected.tokens):
            if expected.margins[n] < _CLOSE:
                return None  # from here on either is right
            if self.tokens[n] != token:
                return f"another token at {n}"
            if not math.isclose(self.logprobs[n], expected.logprobs[n], abs_tol=_CLOSE):
                return f"{abs(self.logprobs[n] - expected.logprobs[n]):.2f} nats at {n}"
        return None


def problems(
    model: Any, policy: ExecutionPolicy, reference: Any = None, lengths: Sequence[int] = _LENGTHS
) -> dict[str, str]:
    """What is wrong, by the way in which requests meet. Raises what the model does, run alone.

    policy: the one that fits the model (runners/self_check.py). reference: the model as mlx-lm has it, if that is
    another one. lengths: of the prompts in tokens.
    """
    alone = _Alone(reference or model)
    prompts = [_prompt(length) for length in lengths]
    found = {}
    for way, groups in {
        "alone": [[prompts[0]]],
        "together": [prompts],
        "joining": [prompts[:1], prompts[1:]],
        "second turn": [[prompts[0]], [], [(*prompts[0], *alone.answer(prompts[0]).tokens, *_prompt(9))]],
    }.items():
        try:
            answers = _Engine(model, policy).run(groups)
            wrong = [answer.problem(alone.answer(prompt)) for prompt, answer in answers.items()]
        except Exception as error:  # foreign code: it can raise anything
            wrong = [f"{type(error).__name__}: {error}"]
        if reasons := [reason for reason in wrong if reason]:
            found[way] = reasons[0]
    return found


class _Alone:
    """mlx-lm's own answers, each computed once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[Tokens, Answer] = {}

    def answer(self, prompt: Tokens) -> Answer:
        """The greedy answer to a prompt."""
        if prompt not in self._known:
            steps = generate_step(mx.array(prompt), self._model, max_tokens=_ANSWER, sampler=_likeliest)
            rows = [(int(token), np.sort(np.array(logprobs.astype(mx.float32)))) for token, logprobs in steps]
            self._known[prompt] = Answer(
                tuple(token for token, _ in rows),
                tuple(float(ranked[-1]) for _, ranked in rows),
                tuple(float(ranked[-1] - ranked[-2]) for _, ranked in rows),
            )
        return self._known[prompt]


class _Engine:
    """A scheduler with a prefix cache."""

    def __init__(self, model: Any, policy: ExecutionPolicy) -> None:
        prefixes = PrefixCache(RamTier(policy)).open(ModelIdentity("zoo"), 1 << 28)
        self._scheduler = Scheduler(model, prefixes=prefixes, stall_target=1.0, policy=policy)
        self._prompts: list[Tokens] = []
        self._answers: list[list[sequence.SampledToken]] = []

    def run(self, groups: Iterable[Sequence[Tokens]]) -> dict[Tokens, Answer]:
        """The answers. Each group comes when the first sequence of the one before has said two tokens, or all is done
        where a group is empty.
        """
        for group in groups:
            if not group:
                self._step_until(self._scheduler.is_empty)
                continue
            first = len(self._prompts)
            for prompt in group:
                tokens = sequence.Sequence(
                    len(self._prompts), prompt, SamplingParams(temperature=0.0), _ANSWER, top_logprobs=0
                )
                self._prompts.append(prompt)
                self._answers.append([])
                self._scheduler.insert([tokens])
            self._step_until(lambda own=first: len(self._answers[own]) >= 2)  # type: ignore[misc]
        self._step_until(self._scheduler.is_empty)
        self._scheduler.close()
        pairs = zip(self._prompts, self._answers, strict=True)
        return {prompt: Answer(tuple(t.token for t in own), tuple(_chosen(t) for t in own)) for prompt, own in pairs}

    def _step_until(self, condition: Any) -> None:
        for _ in range(1000):
            if condition():
                return
            finished = []
            for token in self._scheduler.decode():
                self._answers[token.sequence_id].append(token)
                if len(self._answers[token.sequence_id]) == _ANSWER:
                    finished.append(token.sequence_id)
            self._scheduler.remove(finished)
            self._scheduler.prefill()
        raise RuntimeError("the batch makes no progress")


def _chosen(token: sequence.SampledToken) -> float:
    return token.logprobs.chosen if token.logprobs else math.nan


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _prompt(length: int) -> Tokens:
    return tuple(random.Random(length).choices(range(2, VOCAB), k=length))
