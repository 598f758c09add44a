"""make zoo: every architecture of mlx-lm, tiny and random, in the engine beside mlx-lm alone.

Prints a row per architecture, and the table of docs/models.md.

python -m tools.zoo [--padded] [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

from mlxserver.engine.mlx import mx

from mlxserver.engine.loading.unsupported import Unsupported, naming_what_is_missing
from mlxserver.engine.platform import cpu_layers
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.chunks import execution
from tools.zoo import models
from tools.zoo.comparison import problems


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an architecture. cache: of its decode batch, "" if it does not run here."""

    name: str
    cache: str
    text: str

    @property
    def is_wrong(self) -> bool:
        """Whether it runs and does not say what mlx-lm says."""
        return self.text != "right" and not self.text.startswith("not run")


def check(name: str, policy: ExecutionPolicy) -> Result:
    """Build and compare one architecture."""
    cache, text = "", "right"
    try:
        with naming_what_is_missing():
            model = models.build(name)
            fitting = fitting_policy(model, policy, name)
            cache = execution(model, fitting).cache
            found = problems(model, fitting)
        if found:
            text = "; ".join(f"{way}: {problem}" for way, problem in found.items())
    except Unsupported as missing:
        text = f"not run: {missing}"
    except Exception as error:  # mlx-lm's own failure, of any kind
        text = f"{type(error).__name__}: {error}"
    mx.clear_cache()
    return Result(name, cache, " ".join(text.split()))


def run(names: list[str], policy: ExecutionPolicy) -> list[Result]:
    """Print a row per architecture."""
    print("| architecture | layers keep | runs as | result |\n| --- | --- | --- | --- |")
    results = []
    for name in names:
        results.append(result := check(name, policy))
        print(f"| {name} | {models.CACHES[name]} | {result.cache} | {result.text} |", flush=True)
    return results


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
    options = parser.parse_args()
    if unknown := set(options.names) - set(models.NAMES):
        parser.error(f"unknown architecture: {', '.join(sorted(unknown))}")
    policy = replace(current(), pad_slots=True, bucket_prefill=True) if options.padded else current()
    if policy.replace_kernels:
        cpu_layers.replace_functions()
    results = run(options.names or list(models.NAMES), policy)
    print_summary(results)
    wrong = sum(result.is_wrong for result in results)
    print(f"{wrong} wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
