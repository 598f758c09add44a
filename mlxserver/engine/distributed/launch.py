"""Ranks: the processes that compute large models together. mlx.launch starts the same program once per rank.

Rule 1: the process started as rank 0 serves and leads (distributed/leader.py). It takes no part in collective
        computations; a process that it starts computes rank 0's share. A computation that waits for a lost rank never
        ends, and MLX then blocks everything else that the same process computes.
Rule 2: ranks that compute are followers (distributed/follower.py). Arrays go through MLX's group. Calls and heartbeats
        go through a connection to the leader (distributed/link.py), because a group does not report a silent peer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.config.fields import Shared, marked
from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.distributed.link import LinkLost
from mlxserver.engine.platform import device

_RENDEZVOUS_VARIABLE = "MLX_RANK_RENDEZVOUS"  # in the environment of the process that computes for rank 0
_ADDRESS_BYTES = 512
_ATTEMPTS = 4  # to join
_JOIN_SECONDS = 150  # for all of them


class RanksDiffer(Exception):
    """A rank was started with other settings, or with other versions, than rank 0."""


@dataclass(frozen=True, slots=True)
class RendezvousAddress:
    """Address at which the leader waits for the computing ranks, and the token by which it recognises them."""

    host: str
    port: int
    token: str

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment of the process that computes for rank 0."""
        return {**environ, _RENDEZVOUS_VARIABLE: json.dumps([self.host, self.port, self.token])}


@dataclass(frozen=True, slots=True)
class Membership:
    """Membership of this process in the group that computes."""

    group: Any
    rank: int
    size: int
    leader: RendezvousAddress


def is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several ranks."""
    # A single one gets an empty file of hosts from mlx.launch, or a world of size 1.
    hosts = environ.get("MLX_HOSTFILE")
    is_alone = environ.get("MLX_WORLD_SIZE") == "1" or (hosts and not Path(hosts).read_text().strip())
    return "MLX_RANK" in environ and not is_alone


def is_leader(environ: Mapping[str, str]) -> bool:
    """Whether this process was started as rank 0, which serves and leads."""
    return environ.get("MLX_RANK") == "0" and _RENDEZVOUS_VARIABLE not in environ


def join() -> Membership:
    """Join the group that this process was started for. On the main thread.

    Raises LinkLost, with MLX's reason. SIGALRM ends a process that waits for the others too long.
    """
    signal.alarm(_JOIN_SECONDS)  # rank 0 would wait for the others for ever, and nothing but a signal ends that
    group = _group(_ATTEMPTS)
    signal.alarm(0)
    device.depend_on_others()
    own = os.environ.get(_RENDEZVOUS_VARIABLE, "").encode().ljust(_ADDRESS_BYTES) if group.rank() == 0 else b""
    received = mx.distributed.all_sum(mx.array([*own.ljust(_ADDRESS_BYTES, b"\0")], mx.int32), group=group)
    address: Any = received.tolist()
    return Membership(group, group.rank(), group.size(), RendezvousAddress(*json.loads(bytes(address))))


def _group(attempts: int) -> Any:
    """MLX's group. MLX tries to reach the other ranks for half a minute; rank 0's machine may take longer to start."""
    try:
        return mx.distributed.init(strict=True)
    except RuntimeError as error:
        if attempts == 1:
            raise LinkLost(str(error)) from None
    return _group(attempts - 1)


def shared_facts(server_version: str, settings: Settings) -> dict[str, str]:
    """What must be the same on every rank, by name, without secrets."""
    facts = {"server": server_version, "device": device.describe().kind}
    facts |= {package: version(package) for package in ("mlx", "mlx-lm")}
    facts |= {name: repr(getattr(settings, name)) for name in marked(Settings, Shared)}
    sharded = (spec for spec in settings.models if spec.shard)
    names = marked(ModelSpec, Shared)
    return facts | {f"models.{spec.key}.{name}": repr(getattr(spec, name)) for spec in sharded for name in names}


def compare(rank: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raises RanksDiffer, which names the first difference with both values."""
    for name in sorted({*ours, *theirs}):
        if (own := ours.get(name, "nothing")) != (other := theirs.get(name, "nothing")):
            raise RanksDiffer(f"Rank {rank} was started with another {name} than rank 0: {other} instead of {own}.")


def shared_spec(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a sharded model for another rank, which are arguments of ModelSpec."""
    return {name: getattr(spec, name) for name in marked(ModelSpec, Shared)}


def leaders_address(environ: Mapping[str, str]) -> str:
    """The address by which the other ranks reach rank 0, from what mlx.launch sets for each of its backends."""
    if host := environ.get("NCCL_HOST_IP"):
        return host
    if coordinator := environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    if file := environ.get("MLX_HOSTFILE"):
        return str(json.loads(Path(file).read_text())[0][0]).rpartition(":")[0]
    return socket.gethostname()
