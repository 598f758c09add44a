"""A web site of images and of what is none, and a resolver of names: what image URLs lead to."""

import asyncio
import socket
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.abc import AbstractResolver

from mlxserver.server.image_urls import ImageUrls
from tests.support.images import png

FILE = png()


class Names(AbstractResolver):
    """Names that lead to the test's server, or to the addresses that are given for them, one after the other."""

    def __init__(self, **addresses):
        self._addresses = addresses
        self.asked = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        addresses = self._addresses.get(host.split(".")[0], ["127.0.0.1"])
        address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [{"hostname": host, "host": address, "port": port, "family": kind, "proto": 0, "flags": 0}]

    async def close(self):
        pass


class Site:
    """A web server of images and of what is none, and the requests that came."""

    def __init__(self):
        self.requests = []
        self.url = ""

    async def respond(self, request):
        self.requests.append(request)
        match request.path:
            case "/image":
                return web.Response(body=FILE, content_type="text/html")  # the type is not asked for
            case "/status":
                return web.Response(status=404, body=FILE)
            case "/large":
                return web.Response(body=bytes(3000))
            case "/endless":
                return await self.stream(request, bytes(1000), 100)
            case "/slow":
                return await self.stream(request, b"x", 10**6, pause=0.01)
            case "/silent":
                await asyncio.sleep(60)
            case "/loop":
                raise web.HTTPFound("/loop")
            case "/packed":
                return web.Response(body=FILE, headers={"Content-Encoding": "gzip"})
            case path if path.startswith("/hop/"):
                hops = int(path.removeprefix("/hop/"))
                raise web.HTTPTemporaryRedirect(f"/hop/{hops - 1}" if hops else "/image")
            case "/to":
                return web.Response(status=301, headers={"Location": request.query["url"]})
        return web.Response(status=500)

    async def stream(self, request, part, count, pause=0.0):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(count):
            await response.write(part)
            await asyncio.sleep(pause)
        return response


@asynccontextmanager
async def site():
    served = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", served.respond)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://images.test:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()


def open_to_the_test(names=None):
    """Image URLs of a server that may connect to the test's own, which stands for the internet."""
    return ImageUrls(lambda address: str(address) == "127.0.0.1", names or Names())
