"""Holder of a port that this server can't have: which process it is, and whether it is a server like this one."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 2.0  # seconds for each question
LISTENING = "0A"  # state of a socket in /proc/net/tcp
SOCKET = re.compile(r"socket:\[(\d+)\]")


class PortTaken(OSError):
    """Another process listens on the port."""


@dataclass(frozen=True, slots=True)
class PortHolder:
    """Process that listens on a port; its name and pid are None where they can't be found. is_ours: a server like this.

    models: keys of the models that it has, where it shows them.
    """

    name: str | None = None
    pid: int | None = None
    is_ours: bool = False
    models: tuple[str, ...] = ()

    def describe(self, host: str, port: int) -> str:
        """Who holds the port, and what to do, in one line."""
        process = f" ({self.name or 'process'}, pid {self.pid})" if self.pid else ""
        stop = f"stop it with `kill {self.pid}`, " if self.pid else ""
        remedy = f"{stop}or take another port: --port {port % 65535 + 1}"
        if not self.is_ours:
            return f"port {port} of {host} is taken by another program{process}: {remedy}"
        models = f" with {', '.join(self.models)}" if self.models else ""
        return f"a Multi-Model MLX Server{models} runs on {host}:{port} already{process}: use that one, {remedy}"


def find_holder(host: str, port: int) -> PortHolder:
    """The holder of a port of this machine, as far as it can be found."""
    is_ours, models = _ask_health(host, port)
    pid, name = _of_proc(port) or _of_lsof(port) or (None, None)
    return PortHolder(name, pid, is_ours, models)


def _ask_health(host: str, port: int) -> tuple[bool, tuple[str, ...]]:
    """Whether GET /health answers as this server does, and its models."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(local, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = json.loads(response.read(1 << 20))
    except (OSError, http.client.HTTPException, ValueError):
        return False, ()
    finally:
        connection.close()
    if not isinstance(body, dict) or "status" not in body or response.getheader("Request-Id") is None:
        return False, ()
    models = body.get("models")  # shown to clients that have a key, where there are any
    return True, tuple(map(str, models)) if isinstance(models, dict) else ()


def _of_proc(port: int) -> tuple[int, str] | None:
    """Process id and name by Linux's /proc; None where there is none, or the process is another user's."""
    inodes = {*_inodes(port)}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with suppress(OSError):
            match = SOCKET.fullmatch(str(descriptor.readlink()))
            if match and match[1] in inodes:
                return int(descriptor.parts[2]), (descriptor.parents[1] / "comm").read_text().strip()
    return None


def _inodes(port: int) -> Iterator[str]:
    """Inodes of the sockets that listen on a port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                cells = line.split()
                if cells[3] == LISTENING and int(cells[1].rpartition(":")[2], 16) == port:
                    yield cells[9]


def _of_lsof(port: int) -> tuple[int, str] | None:
    """Process id and name by lsof, which macOS has."""
    try:
        command = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    fields = {line[0]: line[1:] for line in reversed(found.splitlines()) if line}
    return (int(fields["p"]), fields.get("c", "")) if fields.get("p", "").isdigit() else None
