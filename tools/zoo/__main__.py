"""make zoo: every architecture of mlx-lm, tiny and random, in the engine beside mlx-lm alone.

Prints a row per architecture, and the table of docs/models.md. Needs no tokenizer and no network.

python -m tools.zoo [--padded] [--jobs N] [--limit SECONDS] [--json FILE] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tools.zoo import models
from tools.zoo.check import Result
from tools.zoo.workers import run_all


def run(names: list[str], options: argparse.Namespace) -> Iterator[Result]:
    """The results, each as it comes, with a row in the output."""
    print("| architecture | layers keep | runs as | result | seconds |\n| --- | --- | --- | --- | --- |")
    for result in run_all(names, options.jobs, options.limit, is_padded=options.padded):
        cells = (result.name, models.CACHES[result.name], result.cache, result.text, f"{result.seconds:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        yield result


def print_summary(results: list[Result]) -> None:
    """Print the table of docs/models.md: the architectures that are right, by how they run."""
    print("\n| `cache` | architectures |\n| --- | --- |")
    for cache in ("slots", "merged", "single"):
        names = [result.name for result in results if result.cache == cache and result.text == "right"]
        print(f"| `{cache}` | {', '.join(sorted(names, key=str.lower))} |")


def main() -> int:
    """Exit status 0 if all are right, as far as they can run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all by default")
    parser.add_argument("--padded", action="store_true", help="with a GPU's padded slots and bucketed chunks")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (1)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one architecture (600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(models.NAMES):
        parser.error(f"unknown architecture: {', '.join(sorted(unknown))}")
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # for the workers: products of 10 bits can't be compared this closely
    results = []
    for result in run(options.names or list(models.NAMES), options):
        results.append(result)
        if options.json:
            options.json.write_text(json.dumps([asdict(own) for own in results], indent=1) + "\n")
    print_summary(results)
    wrong = sum(result.is_wrong for result in results)
    print(f"{wrong} wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
