"""What open pages cost running streams: tokens/s with readers of /v1/events, and without.

A round measures both, one right behind the other on one server, and which comes first alternates, so that a machine
that slows down slows both. The figure is the median over the rounds of the ratio within each; the middle half of the
ratios says how much of it is noise. The readers read bytes and parse nothing; what a browser takes for its page
comes on top, on the machine that it runs on.

python -m benchmarks.page_readers [--readers 10] [--clients 4] [--tokens 64] [--rounds 15] [--source embedded:smollm2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

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


@dataclass(frozen=True, slots=True)
class Round:
    """Rates of one round, without readers and with them."""

    without: Rate
    with_readers: Rate

    @property
    def ratio(self) -> float:
        """Tokens/s with readers, as a part of those without."""
        return self.with_readers.tokens_per_second / self.without.tokens_per_second

    @property
    def cpu_ratio(self) -> float:
        """The server's time on a processor per token with readers, as a part of that without."""
        return self.with_readers.cpu_us_per_token / self.without.cpu_us_per_token


async def measure(server: RunningServer, readers: int, load: Load, rounds: int) -> list[Round]:
    """The rounds; one that is not counted warms up."""

    async def rate(count: int) -> Rate:
        async with reading(server, count):
            return await load.rate(DIALECTS["chat"])

    await rate(readers)
    found = []
    for number in range(rounds):
        rates = {count: await rate(count) for count in ((0, readers) if number % 2 else (readers, 0))}
        found.append(Round(rates[0], rates[readers]))
    return found


def report(rounds: Sequence[Round], readers: int) -> str:
    """The medians, and the ratios of the rounds."""
    lines = []
    for count, rates in ((0, [each.without for each in rounds]), (readers, [each.with_readers for each in rounds])):
        speeds = [rate.tokens_per_second for rate in rates]
        each = ", ".join(f"{speed:.1f}" for speed in speeds)
        cpu = median(rate.cpu_us_per_token for rate in rates)
        lines.append(f"{count} readers: {median(speeds):.1f} tokens/s ({each}); the server's {cpu:.0f} us per token")
    for name, ratios in (
        ("tokens/s", [each.ratio for each in rounds]),
        ("time per token", [r.cpu_ratio for r in rounds]),
    ):
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        lines.append(f"{name}, ratio within a round: {middle:.3f} (middle half {low:.3f} to {high:.3f})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Start a server and measure; 1 if readers cost more than the target allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--source", default="embedded:smollm2")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "models.toml"
        config.write_text(f'[models.{MODEL}]\nsource = "{arguments.source}"\npreload = true\n')
        with running_server("--no-defaults", "--config", str(config), "--log-level", "warning") as server:
            load = Load(server, arguments.clients, arguments.tokens)
            rounds = asyncio.run(measure(server, arguments.readers, load, arguments.rounds))
    print(report(rounds, arguments.readers))
    ratio = median(each.ratio for each in rounds)
    print(f"ratio: {ratio:.3f}, target: {TARGET} or more")
    return int(ratio < TARGET)


if __name__ == "__main__":
    sys.exit(main())
