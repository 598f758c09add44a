"""The processes that compute large models together, as mlx.launch starts them: the same program, once a rank.

Rule 1: what was started as rank 0 serves, and leads (distributed/leader.py). It computes nothing with others itself;
        rank 0's share is computed by a process that it starts. For work that waits for a rank that is gone waits for
        ever, and MLX then stops whatever else the same process computes.
Rule 2: ranks that compute follow (distributed/follower.py). What they compute goes through MLX's group. What they are
        told, and whether they are there, goes through a connection to the leader (distributed/link.py): a group says
        nothing of a peer that stays silent.
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

_MEETING_VARIABLE = "MLX_RANK_MEETING"  # what the leader gives to the process that computes for rank 0
_MEETING_BYTES = 512
_ATTEMPTS = 4  # to join
_JOIN_SECONDS = 150  # for all of them


class RanksDiffer(Exception):
    """A rank was started with other settings, or with other versions, than rank 0."""


@dataclass(frozen=True, slots=True)
class RendezvousAddress:
    """Where the leader waits for the computing ranks, and the word by which it knows them."""

    host: str
    port: int
    word: str

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What the process that computes for rank 0 is started with."""
        return {**environ, _MEETING_VARIABLE: json.dumps([self.host, self.port, self.word])}


@dataclass(frozen=True, slots=True)
class Membership:
    """This process's group in the group that computes."""

    group: Any
    rank: int
    size: int
    meeting: RendezvousAddress


def is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Whether this process was started as a rank. mlx.launch gives a single one a file of hosts that is empty, or a
    world of size 1.
    """
    hosts = environ.get("MLX_HOSTFILE")
    is_alone = environ.get("MLX_WORLD_SIZE") == "1" or (hosts and not Path(hosts).read_text().strip())
    return "MLX_RANK" in environ and not is_alone


def is_leader(environ: Mapping[str, str]) -> bool:
    """Whether this process was started as rank 0, to serve and to lead."""
    return environ.get("MLX_RANK") == "0" and _MEETING_VARIABLE not in environ


def join() -> Membership:
    """Become a member of the group that this process was started for. On the main thread.

    Raises LinkLost, with MLX's reason. A process that waits for the others too long is ended by SIGALRM.
    """
    signal.alarm(_JOIN_SECONDS)  # rank 0 would wait for the others for ever, deaf to all but a signal
    group = _group(_ATTEMPTS)
    signal.alarm(0)
    device.depend_on_others()
    own = os.environ.get(_MEETING_VARIABLE, "").encode().ljust(_MEETING_BYTES) if group.rank() == 0 else b""
    told = mx.distributed.all_sum(mx.array([*own.ljust(_MEETING_BYTES, b"\0")], mx.int32), group=group)
    letters: Any = told.tolist()
    return Membership(group, group.rank(), group.size(), RendezvousAddress(*json.loads(bytes(letters))))


def _group(attempts: int) -> Any:
    """MLX's group. MLX tries to reach the others for half a minute; rank 0's machine may take longer to start."""
    try:
        return mx.distributed.init(strict=True)
    except RuntimeError as error:
        if attempts == 1:
            raise LinkLost(str(error)) from None
    return _group(attempts - 1)


def shared_facts(server_version: str, settings: Settings) -> dict[str, str]:
    """What must be the same on every rank, by name. Secrets are not among it."""
    facts = {"server": server_version, "device": device.describe().kind}
    facts |= {package: version(package) for package in ("mlx", "mlx-lm")}
    facts |= {name: repr(getattr(settings, name)) for name in marked(Settings, Shared)}
    sharded = (spec for spec in settings.models if spec.shard)
    names = marked(ModelSpec, Shared)
    return facts | {f"models.{spec.key}.{name}": repr(getattr(spec, name)) for spec in sharded for name in names}


def compare(rank: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raises RanksDiffer with the first difference, both values named."""
    for name in sorted({*ours, *theirs}):
        if (own := ours.get(name, "nothing")) != (other := theirs.get(name, "nothing")):
            raise RanksDiffer(f"Rank {rank} was started with another {name} than rank 0: {other} instead of {own}.")


def shared_spec(spec: ModelSpec) -> dict[str, Any]:
    """A sharded model for another rank; ModelSpec(**...) makes it again."""
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
