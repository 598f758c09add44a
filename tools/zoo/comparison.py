"""Comparison of the engine with mlx-lm alone: the same greedy tokens with the same log-probabilities.

In every way that requests meet: alone, together with prompts of other lengths, joining others, as a second turn, and in
a conversation, whose prompts have to come from the prefix cache as far as they are common to an earlier one.
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
_REUSED = 0.9  # share of the tokens in common with an earlier prompt that has to come from the prefix cache
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
    return found | _conversation_problems(alone, _Engine(model, policy))


def _conversation_problems(alone: _Alone, engine: _Engine) -> dict[str, str]:
    """What is wrong in a conversation: a text, or how much of a prompt came from the prefix cache."""
    system, opening = _prompt(60), _prompt(3)
    questions = [_prompt(length) for length in (41, 43, 42, 40)]
    first = (*system, *questions[0], *opening)
    history = (*first, *alone.answer(first).tokens)
    found = {}
    for way, start, question, common in (
        ("first turn", system, questions[0], 0),
        ("same prompt", system, questions[0], len(first) - 1),
        ("continuation", history, questions[1], len(history) - 1),
        ("edited last turn", history, questions[2], len(history)),
        ("same system", system, questions[3], len(system)),
    ):
        prompt = (*start, *question, *opening)
        try:
            answer, cached = engine.ask(prompt, (len(system), len(start), len(prompt) - len(opening)))
            problem = answer.problem(alone.answer(prompt))
        except Exception as error:  # foreign code: it can raise anything
            cached, problem = common, f"{type(error).__name__}: {error}"
        if cached < _REUSED * common:
            problem = problem or f"{cached} of {common} tokens from the prefix cache"
        if problem:
            found[way] = problem
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

    def ask(self, prompt: Tokens, boundaries: Tokens) -> tuple[Answer, int]:
        """The answer to a prompt, and how many of its tokens came from the prefix cache."""
        self._insert(prompt, boundaries)
        self._step_until(self._scheduler.is_empty)
        return _answer(self._answers[-1]), self._answers[-1][0].cached_tokens

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
                self._insert(prompt)
            self._step_until(lambda own=first: len(self._answers[own]) >= 2)  # type: ignore[misc]
        self._step_until(self._scheduler.is_empty)
        self._scheduler.close()
        return {prompt: _answer(own) for prompt, own in zip(self._prompts, self._answers, strict=True)}

    def _insert(self, prompt: Tokens, boundaries: Tokens = ()) -> None:
        sampling = SamplingParams(temperature=0.0)
        number = len(self._prompts)
        self._prompts.append(prompt)
        self._answers.append([])
        self._scheduler.insert(
            [sequence.Sequence(number, prompt, sampling, _ANSWER, top_logprobs=0, boundaries=boundaries)]
        )

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


def _answer(sampled: Sequence[sequence.SampledToken]) -> Answer:
    return Answer(tuple(token.token for token in sampled), tuple(_chosen(token) for token in sampled))


def _chosen(token: sequence.SampledToken) -> float:
    return token.logprobs.chosen if token.logprobs else math.nan


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _prompt(length: int) -> Tokens:
    return tuple(random.Random(length).choices(range(2, VOCAB), k=length))
