"""What open pages cost running streams: tokens/s with readers of /v1/events, and without.

Rounds with and without readers take turns on one server, so that a machine that slows down slows both. The readers
read bytes and parse nothing; what a browser takes for its page comes on top, on the machine that it runs on.

python -m benchmarks.page_readers [--readers 10] [--clients 4] [--tokens 64] [--rounds 5] [--source embedded:smollm2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.dialects import DIALECTS, MODEL, Load, Rate
from tools.harness.running_server import RunningServer, running_server

TARGET = 0.98  # least ratio of tokens/s with readers to those without
PAUSE = 1.0  # seconds between rounds, so that readers have come or gone


@contextlib.asynccontextmanager
async def reading(server: RunningServer, count: int) -> AsyncIterator[None]:
    """So many readers of the server's events."""

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while await reader.read(1 << 16):
                pass
        finally:
            writer.close()

    tasks = [asyncio.create_task(read()) for _ in range(count)]
    await asyncio.sleep(PAUSE)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(PAUSE)


async def measure(server: RunningServer, readers: int, load: Load, rounds: int) -> dict[int, list[Rate]]:
    """Rates by the number of readers, round by round; the first round warms up."""
    chat = DIALECTS["chat"]
    await load.rate(chat)
    rates: dict[int, list[Rate]] = {0: [], readers: []}
    for number in range(rounds):
        for count in (0, readers) if number % 2 else (readers, 0):
            async with reading(server, count):
                rates[count].append(await load.rate(chat))
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Start a server and measure; 1 if readers cost more than the target allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", default="embedded:smollm2")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "models.toml"
        config.write_text(f'[models.{MODEL}]\nsource = "{arguments.source}"\npreload = true\n')
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            load = Load(server, arguments.clients, arguments.tokens)
            rates = asyncio.run(measure(server, arguments.readers, load, arguments.rounds))
    medians = {}
    for count, measured in rates.items():
        medians[count] = median(rate.tokens_per_second for rate in measured)
        each = ", ".join(f"{rate.tokens_per_second:.1f}" for rate in measured)
        cpu = median(rate.cpu_us_per_token for rate in measured)
        print(f"{count} readers: {medians[count]:.1f} tokens/s ({each}); the server's {cpu:.0f} us per token")
    ratio = medians[arguments.readers] / medians[0]
    print(f"ratio: {ratio:.3f}, target: {TARGET} or more")
    return int(ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
