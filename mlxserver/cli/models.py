"""Commands about models: from a running server, or, without one, from this machine itself."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mlxserver.api.native.library import library_list
from mlxserver.api.openai.models import model_list
from mlxserver.client.api import ChatClient
from mlxserver.client.errors import ServerUnreachable, SettingInvalid
from mlxserver.client.views import STATE_STYLES, console, print_status
from mlxserver.config.settings import Settings
from mlxserver.engine.errors import ModelNotFound
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.loading.library.scan import Scanner
from mlxserver.server.model_status import local_status, model_status
from model_manager import ModelManager

CONNECT_TIMEOUT = 3.0  # seconds that a server on another machine gets
COLUMNS = (
    "model",
    "alias",
    "state",
    "kind",
    "format",
    "quant",
    "weights",
    "disk",
    "memory",
    "context",
    "fits",
    "place",
)
RUNNING_COLUMNS = ("model", "state", "memory", "requests", "until unloaded")
FITS = {"now": "now", "after_eviction": "after eviction", "never": "never", None: "-"}
NAMES_OF_POWERS = {9: "B", 6: "M", 3: "k", 0: ""}

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Listing:
    """Models as JSON objects of GET /v1/models and GET /v1/library. url: of the server that gave them; None: none."""

    url: str | None
    models: Sequence[Fields]
    library: Sequence[Fields]

    @property
    def damaged(self) -> list[Fields]:
        """Models that can't be loaded."""
        return [each for each in self.library if each.get("error")]

    def find(self, name: str) -> dict[str, Any]:
        """One model, with all that is known of it. Raises ModelNotFound."""
        for each in (*self.models, *self.damaged):
            if name in (each["id"], *each.get("aliases", ())):
                files = next((entry for entry in self.library if entry["id"] == each["id"]), {})
                return {**files, **each}
        raise ModelNotFound(name, [each["id"] for each in self.models])


async def listing(options: Namespace, settings: Settings) -> Listing:
    """The models of the server, or of this machine where none runs. Raises ClientError."""
    try:
        async with _client(options) as client:
            library = [card.fields for card in await client.library()]
            return Listing(client.base_url, [card.fields for card in await client.models()], library)
    except ServerUnreachable as error:
        if options.base_url:
            raise
        print_status(f"no server at {error.url}: these are the models that it would have")
    manager = await local_manager(settings)
    models = [model_status(each, manager) for each in manager.instances]
    models += [local_status(each, manager) for each in manager.found]
    files = [local_status(each, manager) for each in manager.library.models]
    return Listing(None, model_list(models)["data"], library_list(files)["data"])


async def local_manager(settings: Settings) -> ModelManager:
    """A manager that knows the models of this machine and loads none."""

    def never(*_: object) -> Any:
        raise NotImplementedError

    manager = ModelManager(settings, never, lambda: 0, estimate, scan=Scanner().scan)
    await manager.library.refresh()
    return manager


async def ls(options: Namespace, settings: Settings) -> int:
    """The models, damaged ones last."""
    found = await listing(options, settings)
    if options.json:
        return _print_json({"server": found.url, "data": [*found.models, *found.damaged]})
    _print_rows(COLUMNS, [_row(each) for each in found.models])
    for each in found.damaged:
        print_status(f"{each['id']} can't be loaded: {each['error']} ({each['path']})")
    return 0


async def show(options: Namespace, settings: Settings) -> int:
    """One model, a line per fact."""
    fields = (await listing(options, settings)).find(options.model)
    if options.json:
        return _print_json(fields)
    local = fields.get("local") or fields
    facts = {
        "model": fields["id"],
        "aliases": ", ".join(fields.get("aliases", ())),
        "state": fields["status"]["value"],
        "source": fields.get("source"),
        "path": fields.get("path"),
        "kind": fields.get("kind"),
        "type": fields.get("type"),
        "format": local.get("format"),
        "architecture": local.get("architecture"),
        "quantisation": local.get("quantization"),
        "weights": _count(local.get("parameters")),
        "context": fields.get("context_length"),
        "on disk": _size(local.get("size_bytes")),
        "in memory": _size(fields.get("reserved_bytes") or local.get("needed_bytes")),
        "fits": FITS.get(local.get("fits")),
        "error": fields.get("error") or fields["status"].get("error"),
    }
    _print_rows(None, [(name, str(value)) for name, value in facts.items() if value not in (None, "", "-")])
    return 0


async def ps(options: Namespace) -> int:
    """The models of the server that take memory. Raises ClientError."""
    async with _client(options) as client:
        cards = [card.fields for card in await client.models() if card.state not in ("unloaded", "failed")]
    if options.json:
        return _print_json({"data": cards})
    _print_rows(RUNNING_COLUMNS, [_running_row(each) for each in cards])
    return 0


async def rm(options: Namespace, settings: Settings) -> int:
    """Remove a model's files, if that is confirmed. Raises ClientError, EngineError."""
    found = await listing(options, settings)
    fields = found.find(options.model)
    size = _size((fields.get("local") or fields).get("size_bytes"))
    if not options.yes and not _is_confirmed(f"Remove {fields['id']} ({size}, {fields.get('path', '')})?"):
        return 1
    if found.url:
        async with _client(options) as client:
            freed = await client.delete(fields["id"], force=options.force)
    else:
        freed = (await (await local_manager(settings)).delete(fields["id"])).size_bytes
    if options.json:
        return _print_json({"id": fields["id"], "deleted": True, "freed_bytes": freed})
    print_status(f"Removed {fields['id']}: {decimal(freed)}.")
    return 0


def _client(options: Namespace) -> ChatClient:
    return ChatClient(options.base_url, options.api_key, connect_timeout=CONNECT_TIMEOUT)


def _is_confirmed(question: str) -> bool:
    """The answer of the person at the terminal. Raises SettingInvalid without a terminal."""
    if not sys.stdin.isatty():
        raise SettingInvalid("--yes", "", "this flag, where stdin is no terminal")
    return console(stderr=True).input(f"{question} [y/N] ", markup=False).strip().lower() in ("y", "yes")


def _row(fields: Fields) -> tuple[str, ...]:
    local = fields.get("local") or {}
    return (
        fields["id"],
        ", ".join(fields.get("aliases", ())) or "-",
        fields["status"]["value"],
        fields.get("kind") or "-",
        local.get("format") or "-",
        local.get("quantization") or "-",
        _count(local.get("parameters")),
        _size(local.get("size_bytes")),
        _size(fields.get("reserved_bytes") or local.get("needed_bytes")),
        str(fields.get("context_length") or "-"),
        FITS.get(local.get("fits"), "-"),
        local.get("place") or str(fields.get("source") or "-"),
    )


def _running_row(fields: Fields) -> tuple[str, ...]:
    expires = fields.get("expires_in_seconds")
    return (
        fields["id"],
        fields["status"]["value"],
        _size(fields.get("reserved_bytes")),
        f"{fields.get('running_requests') or 0} + {fields.get('queued_requests') or 0} waiting",
        "-" if expires is None else f"{expires:.0f} s",
    )


def _count(number: int | None) -> str:
    """A number of weights as its makers would give it: 135M, 7.2B."""
    if not number:
        return "-"
    power = next((power for power in (9, 6, 3) if number >= 10**power), 0)
    return f"{number / 10**power:.3g}{NAMES_OF_POWERS[power]}"


def _size(bytes: int | None) -> str:
    return decimal(bytes) if bytes else "-"


def _print_rows(columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    """A table in a terminal; elsewhere lines with tabs between their cells, without a header."""
    terminal = console()
    if not terminal.is_terminal:
        print("".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in rows), end="")
        return
    table = Table(*(columns or ("", "")), box=None, header_style="bold", pad_edge=False, show_header=bool(columns))
    for row in rows:
        table.add_row(*(Text(cell, "bold" if n == 0 else STATE_STYLES.get(cell, "")) for n, cell in enumerate(row)))
    terminal.print(table)


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2))
    return 0
