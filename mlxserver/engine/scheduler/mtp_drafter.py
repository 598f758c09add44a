"""Drafter by the model's own head (loading/mtp.py), whose KV cache is a part of the model's."""

from __future__ import annotations

import functools
import logging
from collections import abc
from dataclasses import replace
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.loading import mtp
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.running import RunningSequence

log = logging.getLogger("engine")

SIZES = (2, 3, 4)  # tokens of a verifying step: a head is trained for one more token, and guesses those behind it
_PRIOR_RATES, _DEPTHS = (0.8, 0.6, 0.5), (1, 2)  # how often a draft is right, by how many are before it


class MtpDrafter:
    """Drafts tokens for all running sequences at once. target: the KV cache of their batch."""

    def __init__(self, model: Any, target: SlotCache) -> None:
        self._target = target
        self._predict = functools.partial(mtp.predict, model)

    @staticmethod
    def rates() -> HitRates:
        """How often its drafts are right, before any is measured."""
        return HitRates(priors=_PRIOR_RATES, bounds=_DEPTHS)

    def is_ready(self, running: RunningSequence) -> bool:
        """Whether it can draft for a sequence: there is a token before the next input."""
        return len(running.sequence.tokens) > 1

    def draft(
        self, sequences: abc.Sequence[RunningSequence], drafting: abc.Sequence[RunningSequence], count: int
    ) -> dict[int, list[int]]:
        """The next tokens of those that draft, `count` of each, by id. sequences: of the batch, whose inputs are known;
        count + 1 tokens of each fit.
        """
        inputs = mx.array([running.fed[-1] for running in sequences], dtype=mx.uint32)
        drafted = cast(list[list[int]], self._target.draft(inputs, count, self._predict).tolist())
        wanted = {running.sequence.id for running in drafting}
        rows = zip(sequences, drafted, strict=True)
        return {running.sequence.id: own for running, own in rows if running.sequence.id in wanted}


def make_mtp_drafter(model: Any, target: SlotCache, policy: ExecutionPolicy) -> MtpDrafter | None:
    """The drafter of a model with a head; None without one, or where its passes can't be computed."""
    if not mtp.has_head(model):
        return None
    try:
        trial = SlotCache(model, replace(policy, compile_steps=False))
        trial.join([caches.new_cache(model)] * 2)
        trial.make_room(2)
        mx.eval(trial.draft(mx.zeros((2,), dtype=mx.uint32), 1, functools.partial(mtp.predict, model)))
    except Exception:  # of any kind: it is foreign code, given what it may not know
        log.info("its multi-token prediction head drafts nothing", exc_info=True)
        return None
    return MtpDrafter(model, target)
