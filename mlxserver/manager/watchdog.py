"""The watchdog: it tells the log when an engine is stuck in a step, and when that one goes on.

/health and /metrics show the same at any time; nothing is ended because of it. The step may still come back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from mlxserver.manager.instance import ModelInstance

log = logging.getLogger("models")

LONGEST_INTERVAL = 5.0  # seconds between two looks


async def watch(instances: Callable[[], Sequence[ModelInstance]], wedged_after: Callable[[], float]) -> None:
    """Look again and again, until cancelled. wedged_after: seconds after which a busy engine counts as stalled."""
    wedged: set[ModelInstance] = set()
    while True:
        await asyncio.sleep(min(LONGEST_INTERVAL, wedged_after() / 4))
        wedged = look(instances(), wedged)


def look(instances: Sequence[ModelInstance], known: Collection[ModelInstance]) -> set[ModelInstance]:
    """The models whose engine is stuck now; the log hears how that differs from those that were known to be."""
    wedged = {instance for instance in instances if instance.is_stalled}
    for instance in wedged.difference(known):
        log.error("wedged", extra={"fields": {"model": instance.key, "cause": instance.failure_reason}})
    for instance in set(known) - wedged:
        log.warning("no longer wedged", extra={"fields": {"model": instance.key}})
    return wedged
