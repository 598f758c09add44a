"""Self-check of a loaded model: turns off the paths of its policy that change what the model computes.

Three short prompts of two lengths are prefilled together and decode together: two at first, the third joins, the first
leaves. Their logits must be those that mlx-lm's model gives each of them alone. Then several tokens of a sequence are
computed at once, as for speculation (scheduler/verification_check.py). Some of mlx-lm's models can't take a
batch, or a mask or offsets per sequence, or can't be compiled, and some of those are wrong without an error.

Rule 1: a path is turned off if it raises, or if it differs for every one of several sets of tokens: in 16 bits a close
        choice of experts may turn out otherwise in a batch, but not always.
Rule 2: an outcome is kept (kept_checks.py) only if there were numbers to compare: weights are no part of its name.
"""

from __future__ import annotations

import logging
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.errors import one_line
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.runners.kept_checks import KeptChecks, Outcome, check_name
from mlxserver.engine.scheduler.execution import execution, make_prefill_strategy
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.verification_check import verifies
from mlxserver.engine.sequence import Sequence

log = logging.getLogger("engine")

_PROMPTS = (7, 12, 7)  # tokens of each; two are alike, so that unpadded chunks have several prompts, too
_STEPS = ((0, 1), (0, 1, 2), (2, 1))  # prompts that decode in each step
_TRIALS = 4  # sets of tokens; the first is enough where nothing differs
_CHUNK = 512  # tokens, enough for all prompts
# Most difference of log-probabilities, relative to their spread. A wrong mask or offset is beyond both.
_EXACT, _ROUNDED = 2e-3, 0.1
_NOISE, _LARGEST = 4, 0.3  # or so many times the noise of a prompt alone, but never more than that
# Wrong in batches, but only with prompts far longer than those here: blocks are counted from the padding on.
_ALWAYS_ALONE = ("minimax_m3_vl", "phi3small")

Logits = list[list[mx.array]]  # per prompt, of each of its steps, [vocab]


def fitting_policy(model: Any, policy: ExecutionPolicy, key: str, kept: KeptChecks | None = None) -> ExecutionPolicy:
    """The policy, without the paths that this model can't take. Raises what the model raises for one prompt alone.

    kept: outcomes of earlier checks, which need not be repeated.
    """
    if type(model).__module__.rpartition(".")[2] in _ALWAYS_ALONE:
        return replace(policy, compile_steps=False, bucket_prefill=False, prompts="alone", batch_cache="single")
    name = check_name(model, policy) if kept else ""
    outcome = kept.find(name) if kept else None
    if not outcome:
        checks = [_Check(model, seed) for seed in range(_TRIALS)]
        outcome = _with_verifying(model, policy, _outcome(checks, policy))
        if kept and checks[0].has_numbers:
            kept.store(name, outcome)
    fitting = outcome.applied_to(policy)
    if fitting != policy:
        log.info("%s: runs as %s; otherwise: %s", key, execution(model, fitting), "; ".join(outcome.reasons))
    return fitting


def _outcome(checks: abc.Sequence[_Check], policy: ExecutionPolicy) -> Outcome:
    """The outcome of checks that are alike but for their tokens."""
    reasons: list[str] = []

    def is_right(passes: Callable[[_Check, ExecutionPolicy], _Problem | None], candidate: ExecutionPolicy) -> bool:
        problem = None
        for check in checks:
            if (problem := passes(check, candidate)) is None:
                return True
            if problem.is_certain:
                break
        reasons.extend([problem.reason] if problem else [])
        return False

    if is_right(_Check.both, policy):
        return Outcome.of(policy)
    prefill = next(own for own in _prefill_paths(policy) if own.prompts == "alone" or is_right(_Check.prefill, own))
    decode = next(own for own in _decode_paths(policy) if own.batch_cache == "single" or is_right(_Check.decode, own))
    is_single = decode.batch_cache == "single"  # what can't decode in a batch is not trusted with a chunk of several
    fitting = replace(
        policy,
        compile_steps=prefill.compile_steps and decode.compile_steps,
        pad_slots=decode.pad_slots,
        bucket_prefill=prefill.bucket_prefill and not is_single,
        bucket_attention=prefill.bucket_attention,
        fuse_layers=decode.fuse_layers,
        prompts="alone" if is_single else prefill.prompts,
        batch_cache=decode.batch_cache,
    )
    return Outcome.of(fitting, *reasons)


def _with_verifying(model: Any, policy: ExecutionPolicy, outcome: Outcome) -> Outcome:
    """The outcome with whether drafted tokens can be verified, where there are slots for it."""
    fitting = outcome.applied_to(policy)
    if fitting.batch_cache != "slots" or not caches.is_plain(model) or verifies(model, fitting):
        return outcome
    reason = "several tokens of a sequence at once change its logits"
    return replace(outcome, verifies=False, reasons=(*outcome.reasons, reason))


def _prefill_paths(policy: ExecutionPolicy) -> Iterator[ExecutionPolicy]:
    """Policies for prefill, from the fastest to the one that any model can take."""
    yield policy
    if policy.bucket_prefill:
        yield replace(policy, compile_steps=False)
        yield (policy := replace(policy, bucket_prefill=False))
    if policy.bucket_attention:
        yield (policy := replace(policy, bucket_attention=False))
    yield replace(policy, prompts="unpadded")
    yield replace(policy, prompts="alone")


def _decode_paths(policy: ExecutionPolicy) -> Iterator[ExecutionPolicy]:
    """Policies for decoding, from the fastest to the one that any model can take."""
    yield policy
    if policy.fuse_layers:
        yield (policy := replace(policy, fuse_layers=False))
    if policy.compile_steps:
        yield (policy := replace(policy, compile_steps=False))
    if policy.pad_slots:
        yield (policy := replace(policy, pad_slots=False))
    yield replace(policy, batch_cache="merged")
    yield replace(policy, batch_cache="single")


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is wrong with a path. is_certain: other tokens would change nothing."""

    reason: str
    is_certain: bool


class _Check:
    """One set of prompts, and what the model says to each alone."""

    def __init__(self, model: Any, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._tokens: list[list[int]] = []
        self._alone: Logits = []
        self._has_steps = False
        parameters = [array.dtype for _, array in tree_flatten(model.parameters())]
        self._tolerance = _EXACT if set(parameters) == {mx.float32} else _ROUNDED

    @property
    def has_numbers(self) -> bool:
        """Whether every step has logits to compare with. A checkpoint with NaN in it has none."""
        steps = [mx.isfinite(step).any() for prompt in self._alone for step in prompt]
        return bool(steps) and bool(mx.stack(steps).all().item())

    def both(self, policy: ExecutionPolicy) -> _Problem | None:
        """What is wrong with prefill and decoding under a policy; None if nothing is."""
        return self._problem(lambda: self._decode(policy, self._prefill(policy)))

    def prefill(self, policy: ExecutionPolicy) -> _Problem | None:
        """What is wrong with prefill; the prompts decode alone."""
        return self._problem(lambda: [self._steps(n, cache) for n, cache in enumerate(self._prefill(policy))])

    def decode(self, policy: ExecutionPolicy) -> _Problem | None:
        """What is wrong with decoding; the prompts are prefilled alone."""
        return self._problem(lambda: self._decode(policy, [self._prefill_alone(n) for n in range(len(_PROMPTS))]))

    def _problem(self, compute: Callable[[], Logits]) -> _Problem | None:
        if not self._alone:
            self._compute_alone()
        try:
            got = compute()
            mx.eval(got)
        except Exception as error:  # of any kind: it is foreign code, given what it may not know
            return _Problem(f"{type(error).__name__}: {one_line(error)[:200]}", is_certain=True)
        if (furthest := _furthest(got, self._alone)) > self._tolerance and not self._has_steps:
            self._compute_steps_alone()
            furthest = _furthest(got, self._alone)
        if furthest <= self._tolerance:
            return None
        return _Problem(f"its logits change by {furthest:.2g} of their spread in company", is_certain=False)

    def _compute_alone(self) -> None:
        """Set the tokens of the prompts and their steps, and the logits of the steps, in one forward pass each."""
        vocab = int(self._model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1])
        longest = max(_PROMPTS) + len(_STEPS) - 1  # of all, because compiled functions are compiled by shape
        for n, length in enumerate(_PROMPTS):
            self._tokens.append([(1 + 131 * n + 7 * i * (i + 3) + 977 * self._seed) % vocab for i in range(longest)])
            logits = self._model(mx.array([self._tokens[n]]), cache=caches.new_cache(self._model))
            self._alone.append([*logits[0, length - 1 : length - 1 + _num_steps(n)]])
        mx.eval(self._alone)

    def _compute_steps_alone(self) -> None:
        """Set the logits to those of the steps one by one, and tolerate more where those differ from the former."""
        steps = [self._steps(n, self._prefill_alone(n)) for n in range(len(_PROMPTS))]
        self._tolerance = max(self._tolerance, min(_NOISE * _furthest(self._alone, steps), _LARGEST))
        self._alone, self._has_steps = steps, True

    def _prefill_alone(self, n: int) -> caches.Cache:
        cache = caches.new_cache(self._model)
        self._model(mx.array([self._tokens[n][: _PROMPTS[n] - 1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return cache

    def _steps(self, n: int, cache: caches.Cache) -> list[mx.array]:
        """Logits of a prompt's steps alone."""
        tokens = self._tokens[n][_PROMPTS[n] - 1 :][: _num_steps(n)]
        return [self._model(mx.array([[token]]), cache=cache)[0, -1] for token in tokens]

    def _prefill(self, policy: ExecutionPolicy) -> list[caches.Cache]:
        """Caches of the prompts, prefilled in as few chunks as the policy allows."""
        strategy = make_prefill_strategy(self._model, policy)
        prompts = []
        for n, length in enumerate(_PROMPTS):
            tokens = tuple(self._tokens[n][:length])
            prompts.append(PendingPrompt([Sequence(n, tokens, SamplingParams(), 1)], 0.0))
            prompts[-1].cache = caches.new_cache(self._model)
        while waiting := [prompt for prompt in prompts if prompt.remaining]:
            strategy.run(strategy.choose(waiting, _CHUNK))
        return [prompt.cache for prompt in prompts]

    def _decode(self, policy: ExecutionPolicy, prefilled: abc.Sequence[caches.Cache]) -> Logits:
        """Logits of the steps in a decode batch."""
        batch = make_batch_cache(self._model, policy)
        batch.join(prefilled[:2], coming=1)
        logits: Logits = [[] for _ in _PROMPTS]
        for number, members in enumerate(_STEPS):
            if number == 1:
                batch.join(prefilled[2:])
            elif number == 2:
                batch.keep(members)
            inputs = [self._tokens[n][_PROMPTS[n] - 1 + len(logits[n])] for n in members]
            rows = batch.advance(mx.array(inputs, dtype=mx.uint32))
            mx.eval(rows)
            for n, row in zip(members, rows, strict=True):
                logits[n].append(row)
        return logits


def _num_steps(n: int) -> int:
    """Number of steps of a prompt."""
    return sum(n in members for members in _STEPS)


def _furthest(logits: Logits, alone: Logits) -> float:
    """The largest distance of a step."""
    steps, expected = ([step for prompt in part for step in prompt] for part in (logits, alone))
    return max(map(_distance, steps, expected))


def _distance(logits: mx.array, alone: mx.array) -> float:
    """Root mean square difference of log-probabilities, relative to their spread; 0 where none are to compare with."""
    got, expected = (array.astype(mx.float32) - mx.logsumexp(array.astype(mx.float32)) for array in (logits, alone))
    known = mx.isfinite(expected)
    count = mx.maximum(known.sum(), 1)
    mean = mx.where(known, expected, 0).sum() / count
    spread = mx.sqrt((mx.where(known, expected - mean, 0) ** 2).sum() / count)
    difference = mx.sqrt((mx.where(known, got - expected, 0) ** 2).sum() / count)
    distance = mx.where(mx.isnan(difference), mx.inf, difference / mx.maximum(spread, 1e-3))
    return cast(float, distance.item())
