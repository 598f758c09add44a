"""Settings of the HTTP side: access, and the limits of one client."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Annotated

from mlxserver.config.fields import Live, Range, Secret, Several, Size

KEYS = Several(r"[\x21-\x2b\x2d-\x7e]{8,512}", "keys of 8 to 512 visible ASCII characters without commas")
FILES = Several(r"(?s:[^,]+)", "names of files or folders")
HOSTS = Several(r"[A-Za-z0-9_.:-]{1,253}", "names or addresses of hosts, without a port")
ORIGINS = Several(r"\*|null|[a-z][a-z0-9+.-]*://[A-Za-z0-9_.:\[\]-]+", "origins such as https://example.org, or *")

Texts = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Access, and the limits of one client. Times are in seconds, sizes in bytes.

    api_key, admin_key: with any of them, every request but /health needs one; without, all clients may do everything.
    The files hold more keys, one per line; config/load.py adds them, so that these fields have all.
    """

    api_key: Annotated[Texts, KEYS, Secret(), Live(), "key of clients that may generate"] = field(
        default=(), repr=False
    )
    admin_key: Annotated[Texts, KEYS, Secret(), Live(), "key of clients that may do everything"] = field(
        default=(), repr=False
    )
    api_key_file: Annotated[Texts, FILES, Live(), "file with such keys, one per line"] = ()
    admin_key_file: Annotated[Texts, FILES, Live(), "file with such keys, one per line"] = ()
    allow_host: Annotated[Texts, HOSTS, Live(), "another name of the server (in the Host header)"] = ()
    allow_origin: Annotated[Texts, ORIGINS, Live(), "origin whose pages may use the server (CORS)"] = ()

    max_connections: Annotated[int, Range(1, 60_000), "connections at once; over it: 503"] = 1024
    header_timeout: Annotated[float, Range(0.1, 3600), "seconds until a request's head is there"] = 10.0
    body_timeout: Annotated[float, Range(0.1, 86_400), "seconds until a request's body is there"] = 60.0
    send_timeout: Annotated[float, Range(0.1, 86_400), "seconds that a client may leave its answer unread"] = 60.0
    idle_connection_timeout: Annotated[
        float, Range(1, 86_400), "seconds that a connection may be idle between two requests"
    ] = 75.0
    heartbeat_interval: Annotated[
        float, Range(0, 3600), Live(), "seconds without a byte after which a stream gets a heartbeat; 0: never"
    ] = 5.0
    max_unread_events: Annotated[int, Range(1), "events of a stream that may wait for a slow reader"] = 16_384

    max_body_bytes: Annotated[int, Range(1), Size(), "longest request body"] = 64 << 20
    max_json_values: Annotated[int, Range(1000), "commas and opening brackets in a body, those in text included"] = (
        500_000
    )
    max_json_depth: Annotated[int, Range(8, 256), "lists and objects inside each other"] = 64
    max_messages: Annotated[int, Range(1), "messages in a conversation"] = 4096
    max_prompt_bytes: Annotated[int, Range(1), Size(), "longest prompt, before it is made tokens"] = 2 << 20
    max_images: Annotated[int, Range(1), Live(), "images in a request"] = 100
    max_image_bytes: Annotated[int, Range(1), Size(), Live(), "longest file of an image"] = 20 << 20
    allow_image_urls: Annotated[bool, Live(), "fetch images that a request names by http or https URLs"] = False
    image_url_timeout: Annotated[float, Range(0.1, 600), Live(), "seconds until such an image is there"] = 10.0
    max_stop_strings: Annotated[int, Range(1, 1024), "stop strings of a request"] = 16
    max_logit_bias: Annotated[int, Range(1), "tokens in a request's logit_bias"] = 1024
    max_choices: Annotated[int, Range(1, 128), "answers to one request (n)"] = 16

    @property
    def has_keys(self) -> bool:
        """Whether clients need a key."""
        return bool(self.api_key or self.admin_key)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
