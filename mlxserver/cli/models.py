"""Commands about models: from a running server, or, without one, from this machine itself."""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from mlxserver.cli.output import count, print_json, print_rows, size
from mlxserver.client.api import ChatClient
from mlxserver.client.errors import ServerUnreachable, SettingInvalid
from mlxserver.client.views import console, print_status
from mlxserver.config.settings import Settings
from mlxserver.engine.errors import ModelNotFound

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
SPARE = ("format", "disk", "alias", "weights", "place", "quant", "context", "kind", "memory")
RUNNING_COLUMNS = ("model", "state", "memory", "requests", "until unloaded")
FOUND_COLUMNS = ("model", "quant", "weights", "download", "memory", "fits", "downloads", "here")
SPARE_OF_FOUND = ("downloads", "weights", "quant", "memory", "here")
FITS = {"now": "now", "after_eviction": "after eviction", "never": "never", None: "-"}

Fields = Mapping[str, Any]
ReadSettings = Callable[[], Settings]  # those of a server, where none runs


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


async def listing(options: Namespace, settings: ReadSettings) -> Listing:
    """The models of the server, or of this machine where none runs. Raises ClientError."""
    try:
        async with client_of(options) as client:
            library = [card.fields for card in await client.library()]
            return Listing(client.base_url, [card.fields for card in await client.models()], library)
    except ServerUnreachable as error:
        if options.base_url:
            raise
        print_status(f"no server at {error.url}: these are the models that it would have")
    from mlxserver.cli import local  # here, because it imports the server

    return Listing(None, *await local.listing(settings()))


async def ls(options: Namespace, settings: ReadSettings) -> int:
    """The models, damaged ones last."""
    found = await listing(options, settings)
    if options.json:
        return print_json({"server": found.url, "data": [*found.models, *found.damaged]})
    print_rows(COLUMNS, [_row(each) for each in found.models], SPARE)
    for each in found.damaged:
        print_status(f"{each['id']} can't be loaded: {each['error']} ({each['path'] or each['place']})")
    return 0


async def show(options: Namespace, settings: ReadSettings) -> int:
    """One model, a line per fact."""
    fields = (await listing(options, settings)).find(options.model)
    if options.json:
        return print_json(fields)
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
        "weights": count(local.get("parameters")),
        "context": fields.get("context_length"),
        "on disk": size(local.get("size_bytes")),
        "in memory": size(fields.get("reserved_bytes") or local.get("needed_bytes")),
        "fits": FITS.get(local.get("fits")),
        "error": fields.get("error") or fields["status"].get("error"),
    }
    print_rows(None, [(name, str(value)) for name, value in facts.items() if value not in (None, "", "-")])
    return 0


async def ps(options: Namespace, settings: ReadSettings) -> int:
    """The models of the server that take memory. Raises ClientError."""
    async with client_of(options) as client:
        cards = [card.fields for card in await client.models() if card.state not in ("unloaded", "failed")]
    if options.json:
        return print_json({"data": cards})
    print_rows(RUNNING_COLUMNS, [_running_row(each) for each in cards])
    return 0


async def rm(options: Namespace, settings: ReadSettings) -> int:
    """Remove a model's files, if that is confirmed. Raises ClientError, EngineError."""
    found = await listing(options, settings)
    fields = found.find(options.model)
    bytes_on_disk = (fields.get("local") or fields).get("size_bytes")
    where = ", ".join(filter(None, (size(bytes_on_disk), fields.get("path"))))
    has_files = bool(bytes_on_disk or fields.get("path"))  # without, the removal is refused below
    if has_files and not options.yes and not _is_confirmed(f"Remove {fields['id']} ({where})?"):
        print_status("Nothing was removed.")
        return 1
    if found.url:
        async with client_of(options) as client:
            freed = await client.delete(fields["id"], force=options.force)
    else:
        from mlxserver.cli import local

        freed = await local.delete(fields["id"], settings())
    if options.json:
        return print_json({"id": fields["id"], "deleted": True, "freed_bytes": freed})
    print_status(f"Removed {fields['id']}: {decimal(freed)}.")
    return 0


def client_of(options: Namespace) -> ChatClient:
    """The client of the server that a command asks."""
    return ChatClient(options.base_url, options.api_key, connect_timeout=CONNECT_TIMEOUT)


def _is_confirmed(question: str) -> bool:
    """The answer of the person at the terminal. Raises SettingInvalid without a terminal."""
    if not sys.stdin.isatty():
        raise SettingInvalid("--yes", "", "this flag, where stdin is no terminal")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would let the question go on
    try:
        answer = console(stderr=True).input(f"{question} [y/N] ", markup=False)
    except EOFError:
        answer = ""
    finally:
        signal.signal(signal.SIGINT, before)
    return answer.strip().lower() in ("y", "yes")


def _row(fields: Fields) -> tuple[str, ...]:
    local = fields.get("local") or {}
    return (
        fields["id"],
        ", ".join(fields.get("aliases", ())) or "-",
        fields["status"]["value"],
        fields.get("kind") or "-",
        local.get("format") or "-",
        local.get("quantization") or "-",
        count(local.get("parameters")),
        size(local.get("size_bytes")),
        size(fields.get("reserved_bytes") or local.get("needed_bytes")),
        str(fields.get("context_length") or "-"),
        FITS.get(local.get("fits"), "-"),
        local.get("place") or str(fields.get("source") or "-"),
    )


def _running_row(fields: Fields) -> tuple[str, ...]:
    expires = fields.get("expires_in_seconds")
    return (
        fields["id"],
        fields["status"]["value"],
        size(fields.get("reserved_bytes")),
        f"{fields.get('running_requests') or 0} + {fields.get('queued_requests') or 0} waiting",
        "-" if expires is None else f"{expires:.0f} s",
    )


async def search(options: Namespace, settings: ReadSettings) -> int:
    """Models of the hub. Raises ClientError, EngineError."""
    words = " ".join(options.words)
    try:
        async with client_of(options) as client:
            found: Sequence[Fields] = await client.search(words, options.limit)
    except ServerUnreachable:
        if options.base_url:
            raise
        from mlxserver.cli import local

        found = await local.search(words, options.limit, settings())
    if options.json:
        return print_json({"data": found})
    print_rows(FOUND_COLUMNS, [_found_row(each) for each in found], SPARE_OF_FOUND)
    if not found:
        print_status(f"The hub has no model for MLX with {words!r} in its name.")
        return 1
    print_status(f"Download one with: mlx-server pull {found[0]['id']}")
    return 0


def _found_row(fields: Fields) -> tuple[str, ...]:
    return (
        fields["id"],
        fields.get("quantization") or "-",
        count(fields.get("parameters")),
        size(fields.get("size_bytes")),
        size(fields.get("needed_bytes")),
        FITS.get(fields.get("fits"), "-"),
        count(fields.get("downloads")),
        "yes" if fields.get("is_local") else "terms to accept" if fields.get("gated") else "-",
    )
