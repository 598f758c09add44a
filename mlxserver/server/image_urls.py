"""Images of a request: how many and how large they may be, and the fetching of those that are named by URLs.

Rule 1: a URL is fetched only where the operator allows it, by http or https, without a proxy and without cookies.
Rule 2: the address is checked of each socket that is about to connect, whatever name or redirect led to it. So no
        answer of a name server, and no later one, leads to an address of this machine or its network.
Rule 3: bytes are counted as they are read. What they are is found by their content, in the engine.
Rule 4: every failure is a PromptRejected with the image's origin, and its text shows nothing of the network.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from mlxserver.config.http import HttpSettings
from mlxserver.engine.conversation import Image, Message, Part, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import ChatPrompt, Prompt

MAX_REDIRECTS: Final = 3
CONCURRENT: Final = 4  # connections of one request
CHUNK: Final = 64 << 10  # bytes
REDIRECTS: Final = (301, 302, 303, 307, 308)
GLOBAL_UNICAST: Final = IPv6Network("2000::/3")  # RFC 4291: all else of IPv6 is local, special, or of no use yet
NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052: its last 32 bits are an IPv4 address
HEADERS: Final = {"Accept": "image/*", "Accept-Encoding": "identity"}
NOT_PUBLIC: Final = "is at an address that this server fetches nothing from"

Address = IPv4Address | IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet: not to this machine, a private network, a link or a group."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(inner)
        return address.is_global and address in GLOBAL_UNICAST
    return address.is_global and not address.is_multicast


def is_elsewhere(address: Address) -> bool:
    """Whether an address belongs to the internet and to another machine: this one may have a public address, too."""
    return is_public(address) and not is_own(address)


def is_own(address: Address) -> bool:
    """Whether an address is one of this machine: a socket can be bound to it. Nothing is sent."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
            return True
    except OSError:
        return False


class _AddressRefused(OSError):
    """The address of a socket is none to connect to."""


@dataclass(frozen=True)
class ImageUrls:
    """Images of requests.

    is_allowed: whether an address may be connected to. resolver: of names; None is the system's.
    """

    is_allowed: Callable[[Address], bool] = is_elsewhere
    resolver: AbstractResolver | None = field(default=None, compare=False)

    async def fetch(self, prompt: Prompt, settings: HttpSettings) -> Prompt:
        """The prompt with all its images' bytes. Raises PromptRejected."""
        if not isinstance(prompt, ChatPrompt):
            return prompt
        _check(prompt.images, settings)
        urls = {image.url: image for image in prompt.images if image.url and not image.data}
        if not urls:
            return prompt
        files = await self._fetch_all(urls, settings)
        messages = tuple([_filled(message, files) for message in prompt.conversation])
        return replace(prompt, conversation=messages)

    async def _fetch_all(self, urls: dict[str, Image], settings: HttpSettings) -> dict[str, bytes]:
        """The files by their URLs. They may take as many bytes together as a body that has them in it."""
        connector = aiohttp.TCPConnector(
            resolver=self.resolver,
            use_dns_cache=False,
            force_close=True,
            limit=CONCURRENT,
            socket_factory=self._socket,
        )
        budget = _Budget(settings.max_body_bytes)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=HEADERS,
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=settings.image_url_timeout),
        ) as session:
            fetches = [_Fetch(session, image, settings, budget).run() for image in urls.values()]
            return dict(zip(urls, await _all(fetches), strict=True))

    def _socket(self, info: Any) -> socket.socket:
        """A socket to connect to an address (rule 2). Raises _AddressRefused."""
        family, kind, protocol, _, address = info
        if not self.is_allowed(ip_address(str(address[0]).partition("%")[0])):
            raise _AddressRefused(NOT_PUBLIC)
        return socket.socket(family, kind, protocol)


@dataclass
class _Budget:
    """Bytes that the files of a request may still have."""

    left: int


@dataclass(frozen=True)
class _Fetch:
    """The fetch of one image."""

    session: aiohttp.ClientSession
    image: Image
    settings: HttpSettings
    budget: _Budget

    async def run(self) -> bytes:
        """The file. Raises PromptRejected."""
        seconds = self.settings.image_url_timeout
        try:
            async with asyncio.timeout(seconds):  # of all redirects together
                return await self._follow()
        except TimeoutError:
            raise _rejected(self.image, f"did not arrive within {seconds:g} seconds") from None
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, _AddressRefused)
            raise _rejected(self.image, NOT_PUBLIC if refused else "can't be reached") from None
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: of a URL
            raise _rejected(self.image, "can't be fetched") from None

    async def _follow(self) -> bytes:
        url = URL(self.image.url or "")
        for _ in range(MAX_REDIRECTS + 1):
            if url.scheme not in ("http", "https") or not url.host:
                raise _rejected(self.image, "leads to a URL that is not of http or https")
            async with self.session.get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status in REDIRECTS and location:
                    url = url.join(URL(location))
                elif response.status == 200:
                    return await self._read(response)
                else:
                    raise _rejected(self.image, f"is answered with the status {response.status}")
        raise _rejected(self.image, f"leads to more than {MAX_REDIRECTS} others")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        most = self.settings.max_image_bytes
        file = bytearray()
        if (response.content_length or 0) > most:
            raise _too_large(self.image, most)
        async for part in response.content.iter_chunked(CHUNK):
            file += part
            self.budget.left -= len(part)
            if len(file) > most:
                raise _too_large(self.image, most)
            if self.budget.left < 0:
                limit = self.settings.max_body_bytes
                raise _rejected(self.image, f"makes the request's images longer than {limit} bytes, the limit")
        return bytes(file)


async def _all(fetches: Sequence[Any]) -> list[bytes]:
    """The results of all. The first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(fetch) for fetch in fetches]
    except* PromptRejected as failures:
        failure = failures.exceptions[0]
        raise failure from None
    return [task.result() for task in tasks]


def _check(images: Sequence[Image], settings: HttpSettings) -> None:
    """Check what is known before any is fetched. Raises PromptRejected."""
    if len(images) > settings.max_images:
        origin = images[settings.max_images].origin
        raise PromptRejected(
            f"'{origin}' is one of {len(images)} images. Expected at most {settings.max_images}, the limit of this "
            "server.",
            origin,
        )
    for image in images:
        if len(image.data) > settings.max_image_bytes:
            raise _too_large(image, settings.max_image_bytes)
        if image.url and not image.data and not settings.allow_image_urls:
            raise _rejected(image, "is not fetched: this server allows none (allow_image_urls)")


def _filled(message: Message, files: dict[str, bytes]) -> Message:
    def filled(image: Image) -> Image:
        return replace(image, data=files[image.url]) if image.url and not image.data else image

    def filled_part(part: Part) -> Part:
        if isinstance(part, ToolResult):
            return replace(part, images=tuple(map(filled, part.images)))
        return filled(part) if isinstance(part, Image) else part

    return replace(message, parts=tuple(map(filled_part, message.parts)))


def _too_large(image: Image, most: int) -> PromptRejected:
    message = f"The image '{image.origin}' is longer than {most} bytes, the limit of this server."
    return PromptRejected(message, image.origin)


def _rejected(image: Image, fault: str) -> PromptRejected:
    message = f"The URL of the image '{image.origin}' {fault}. Send the image itself, in base64."
    return PromptRejected(message, image.origin)
