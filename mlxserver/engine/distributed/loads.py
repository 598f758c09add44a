"""Loads of a computing rank's shares of models, while its other models run on.

Rule 1: downloads and conversions, which take long without MLX, run on threads of their own.
Rule 2: weights are read piece by piece. Between the pieces the rank processes messages about other models, as the other
        ranks do, which may read faster or slower.
Rule 3: a share that does not fit beside the loaded ones is refused before anything of it is read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.distributed.link import Message
from mlxserver.engine.errors import LoadAborted, LoadFailed, NoRoom, Projection, one_line
from mlxserver.engine.kv_cache import caches
from mlxserver.engine.loading import estimate, loader, sources
from mlxserver.engine.loading.sharding import divider, share

log = logging.getLogger("ranks")


class Loads:
    """Loads of one rank. group: the rank's. memory_limit: bytes, as in the settings.

    send: sends the leader a message. later: has load() called on the rank's thread. meanwhile: processes the messages
    that have arrived since.
    """

    def __init__(
        self,
        group: Any,
        memory_limit: int,
        send: Callable[[Mapping[str, Any]], None],
        later: Callable[[Message], None],
        meanwhile: Callable[[], None],
    ) -> None:
        self._group = group
        self._budget = estimate.budget(memory_limit)
        self._send = send
        self._later = later
        self._meanwhile = meanwhile
        self._reserved: dict[int, int] = {}  # bytes, by the models' numbers
        self._wanted: set[int] = set()  # numbers of the models that are being loaded
        self.is_reading = False

    def begin(self, message: Message) -> None:
        """Fetch a model; load() does the rest. forget() may come at any time."""
        self._wanted.add(message["number"])
        threading.Thread(target=self._fetch, args=(message,), name="rank-fetch", daemon=True).start()

    def forget(self, number: int) -> None:
        """Drop a model; a load under way is aborted."""
        self._wanted.discard(number)
        self._reserved.pop(number, None)

    def load(self, message: Message) -> tuple[ModelSpec, loader.LoadedModel] | None:
        """Load this rank's share of a model and send the leader the result; None if the load fails or is aborted."""
        number = message["number"]
        spec = replace(ModelSpec(**message["spec"]), source=message["path"])
        self.is_reading = True
        try:
            loaded = self._load(number, spec)
        except NoRoom as error:
            self._report(number, projection=asdict(error.projection))
        except LoadFailed as error:
            self._report(number, error=error.cause)
        except LoadAborted:
            log.info("A load of %s was aborted.", spec.key)
        else:
            self._report(number, **_facts(loaded))
            return spec, loaded
        finally:
            self.is_reading = False
            self._wanted.discard(number)
        self.forget(number)
        return None

    def _fetch(self, message: Message) -> None:
        number, spec = message["number"], ModelSpec(**message["spec"])
        try:
            path = sources.resolve(spec.source, progress=lambda *step: self._check(number, spec.key))
        except LoadAborted:
            return
        except Exception as error:  # the hub, the disk, the converter: the leader waits for an answer in any case
            self._report(number, error=one_line(error))
        else:
            self._later({**message, "kind": "fetched", "path": str(path)})

    def _load(self, number: int, spec: ModelSpec) -> loader.LoadedModel:
        """Raises NoRoom, LoadFailed, LoadAborted."""

        def report(stage: str, done: int, total: int) -> None:
            self._meanwhile()
            self._check(number, spec.key)

        self._check(number, spec.key)
        expected = share(estimate.estimate(spec), spec, self._group)
        self._admit(number, spec.key, expected.total)
        loaded = loader.load(spec, progress=report, divide=divider(spec, self._group))
        self._reserved[number] = loaded.weight_bytes + expected.cache + expected.activations
        return loaded

    def _admit(self, number: int, key: str, needed: int) -> None:
        held = sum(self._reserved.values())
        if held + needed > self._budget:
            free = max(0, self._budget - held)
            raise NoRoom(key, Projection(needed, free, evictable=0, pinned=0, busy=held, budget=self._budget))
        self._reserved[number] = needed

    def _check(self, number: int, key: str) -> None:
        """Raises LoadAborted if the model is not wanted any more."""
        if number not in self._wanted:
            raise LoadAborted(key)

    def _report(self, number: int, **content: Any) -> None:
        self._send({"kind": "loaded", "number": number, **content})


def _facts(loaded: loader.LoadedModel) -> dict[str, Any]:
    """Facts of a share that the leader needs."""
    logits = loaded.model(mx.zeros((1, 1), dtype=mx.uint32))  # lazy: nothing is computed
    return {
        "sizes": asdict(caches.cache_sizes(loaded.model)),
        "weight_bytes": loaded.weight_bytes,
        "vocab_size": logits.shape[-1],
    }
