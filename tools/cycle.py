"""Memory leaks of loading: loads and unloads one model many times, and compares the memory of the process.

Run: python -m tools.cycle [--cycles 200] [--source embedded:smollm2]. Between load and unload one request is answered.
Exit status 1 if the memory after the last cycle is more than 5 % above that after the tenth.
"""

from __future__ import annotations

import argparse
import sys

from tools.harness.running_server import RunningServer, running_server

SETTLED = 10  # cycles before the memory that is compared
ALLOWED_GROWTH = 1.05


def cycle(server: RunningServer, source: str) -> int:
    """Load, send one request and unload; the memory of the process afterwards, in bytes."""
    assert server.post("/v1/models/load", {"model": source, "key": "model"}).status == 200
    assert server.chat("model", "Hello", max_tokens=3).status == 200
    assert server.post("/v1/models/unload", {"key": "model"}).status == 200
    figures = server.get("/metrics").body.decode().splitlines()
    return int(float(next(line.split()[1] for line in figures if line.startswith("mlx_server_process_bytes "))))


def main() -> int:
    """Run the cycles and print the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--source", default="embedded:smollm2")
    arguments = parser.parse_args()
    with running_server("--no-defaults", "--log-level", "warning") as server:
        sizes = []
        for number in range(1, arguments.cycles + 1):
            sizes.append(cycle(server, arguments.source))
            if number in (1, SETTLED) or number % 50 == 0:
                print(f"cycle {number:>4}: {sizes[-1] / 2**20:.1f} MiB", flush=True)
        server.stop()
    return 0 if sizes[-1] <= sizes[min(SETTLED, len(sizes)) - 1] * ALLOWED_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
