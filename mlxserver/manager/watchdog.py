"""Watchdog: logs when an engine stalls in a step, and when it goes on.

/health and /metrics show the same at any time. Nothing is ended because of it: the step may still return.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from mlxserver.manager.instance import ModelInstance

log = logging.getLogger("models")

LONGEST_INTERVAL = 5.0  # seconds between two checks


async def watch(instances: Callable[[], Sequence[ModelInstance]], stalled_after: Callable[[], float]) -> None:
    """Check periodically, until cancelled. stalled_after: seconds per step after which an engine counts as stalled."""
    stalled: set[ModelInstance] = set()
    while True:
        await asyncio.sleep(min(LONGEST_INTERVAL, stalled_after() / 4))
        stalled = check(instances(), stalled)


def check(instances: Sequence[ModelInstance], known: Collection[ModelInstance]) -> set[ModelInstance]:
    """Models whose engine is stalled now; logs how they differ from those that were known to be."""
    stalled = {instance for instance in instances if instance.is_stalled}
    for instance in stalled.difference(known):
        log.error("stalled", extra={"fields": {"model": instance.key, "cause": instance.failure_reason}})
    for instance in set(known) - stalled:
        log.warning("no longer stalled", extra={"fields": {"model": instance.key}})
    return stalled
