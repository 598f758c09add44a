"""Models of a computing rank, by the numbers that the leader has given them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.distributed.codec import decode_mask, decode_sequences, encode_tokens
from mlxserver.engine.distributed.launch import Membership
from mlxserver.engine.distributed.link import Message
from mlxserver.engine.distributed.loads import Loads
from mlxserver.engine.distributed.sampler import FollowingSampler, LeadingSampler
from mlxserver.engine.kv_cache.caches import CacheSizes
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.identity import model_identity
from mlxserver.engine.platform import streams
from mlxserver.engine.scheduler.peers import FixedPeers
from mlxserver.engine.scheduler.prefill import ChunkBudget
from mlxserver.engine.scheduler.scheduler import Scheduler
from mlxserver.engine.scheduler.warm_up import Shape


class Models:
    """Loads, runs and drops models on the leader's messages. mask: waits for the leader's reply to a question."""

    def __init__(
        self,
        membership: Membership,
        loads: Loads,
        send: Callable[[Mapping[str, Any]], None],
        mask: Callable[[], Message],
    ) -> None:
        self._group = membership.group
        self._leads = membership.rank == 0
        self._loads = loads
        self._send = send
        self._mask = mask
        self._loaded: dict[int, tuple[ModelSpec, loader.LoadedModel]] = {}
        self._schedulers: dict[int, Scheduler] = {}
        self._warm_ups: dict[int, Generator[Shape, None, None]] = {}
        self._warm: set[int] = set()  # models whose warm-up is over
        self._prefix_cache = PrefixCache(RamTier())
        self._peers = FixedPeers()  # as the leader knows them

    def act(self, message: Message) -> None:
        """Process a message about a model. After an exception the ranks are out of step."""
        number = message["number"]
        match message["kind"]:
            case "load":
                self._loads.begin(message)
            case "fetched":
                if loaded := self._loads.load(message):
                    self._loaded[number] = loaded
            case "open":
                self._open(number, CacheSizes(**message["sizes"]), message["stall_target"])
            case "calls":
                for name, *arguments in message["calls"]:
                    self._call(number, name, arguments)
            case "drop":
                self._drop(number)

    def _open(self, number: int, sizes: CacheSizes, stall_target: float) -> None:
        spec, loaded = self._loaded[number]
        identity = replace(
            model_identity(spec, loaded),
            share=f"model {number}",
            bytes_per_token=sizes.per_token + sizes.per_window_token,
            bytes_per_checkpoint=sizes.checkpoint,
        )
        self._schedulers[number] = scheduler = Scheduler(
            loaded.model,
            max_running=spec.max_running,
            stall_target=stall_target,
            prefixes=self._prefix_cache.open(identity, spec.prefix_cache_bytes) if spec.prefix_cache_bytes else None,
            peers=self._peers,
            max_kv_tokens=loaded.limits.cache_tokens,
            make_sampler=partial(LeadingSampler if self._leads else FollowingSampler, group=self._group),
            sizes=sizes,
            checkpoint_interval=spec.checkpoint_interval,
        )
        self._warm_ups[number] = scheduler.warm_up(loaded.limits.context, loaded.limits.reserved)

    def _call(self, number: int, name: str, arguments: Sequence[Any]) -> None:
        """Make a call of the leader's batch."""
        scheduler = self._schedulers[number]
        match name, arguments:
            case "insert", (sequences, now):
                scheduler.insert(decode_sequences(sequences, partial(self._ask, number) if self._leads else None), now)
            case "remove", (sequence_ids,):
                scheduler.remove(sequence_ids)
            case "decode", (peer_step_seconds,):
                self._peers.step_seconds = peer_step_seconds
                self._decode(number, scheduler)
            case "prefill", (chunk_budget,):
                scheduler.prefill(ChunkBudget(**chunk_budget))
            case "warm_up", ():
                if next(self._warm_ups[number], None) is None:
                    self._warm.add(number)
            case "shrink_prefixes", (max_bytes,):
                scheduler.shrink_prefixes(max_bytes)
            case _:
                raise ValueError(f"call {name!r}; expected one of a batch's")

    def _decode(self, number: int, scheduler: Scheduler) -> None:
        tokens = scheduler.decode()
        if self._leads:
            self._send(
                {
                    "kind": "tokens",
                    "number": number,
                    "tokens": encode_tokens(tokens),
                    "decoding": scheduler.num_decoding,
                    "running": scheduler.load.num_running,
                    "has_prompts": scheduler.has_prompts(),
                    "step_seconds": scheduler.load.step_seconds,
                    "is_warm": number in self._warm,
                    "chunk_budget": asdict(scheduler.chunk_budget()),
                }
            )

    def _ask(self, number: int, sequence_id: int, accepted: Sequence[int]) -> bytes | None:
        """Ask the leader for the token mask of a sequence."""
        self._send({"kind": "question", "number": number, "sequence": sequence_id, "accepted": accepted})
        return decode_mask(self._mask()["mask"])

    def _drop(self, number: int) -> None:
        if scheduler := self._schedulers.pop(number, None):
            self._warm_ups.pop(number).close()
            self._warm.discard(number)
            scheduler.close()
        del scheduler
        self._loaded.pop(number, None)
        self._loads.forget(number)
        streams.free_memory()
