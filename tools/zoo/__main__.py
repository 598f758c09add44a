"""make zoo: every architecture of mlx-lm, tiny and random, in the engine beside mlx-lm alone. Prints a table.

python -m tools.zoo [--padded] [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from mlxserver.engine.mlx import mx

from mlxserver.engine.loading.unsupported import Unsupported, naming_what_is_missing
from mlxserver.engine.platform import cpu_layers
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.runners.self_check import fitting_policy
from mlxserver.engine.scheduler.chunks import execution
from tools.zoo import models
from tools.zoo.comparison import problems


def run(names: list[str], policy: ExecutionPolicy) -> int:
    """Print a row per architecture; returns how many are wrong."""
    wrong = 0
    print("| architecture | layers keep | runs as | result |\n| --- | --- | --- | --- |")
    for name in names:
        cache, result = "", "right"
        try:
            with naming_what_is_missing():
                model = models.build(name)
                fitting = fitting_policy(model, policy, name)
                cache = execution(model, fitting).cache
                found = problems(model, fitting)
            if found:
                wrong, result = wrong + 1, "; ".join(f"{way}: {problem}" for way, problem in found.items())
        except Unsupported as missing:
            result = f"not run: {missing}"
        except Exception as error:  # mlx-lm's own failure, of any kind
            wrong, result = wrong + 1, f"{type(error).__name__}: {error}"
        print(f"| {name} | {models.CACHES[name]} | {cache} | {' '.join(result.split())} |", flush=True)
        mx.clear_cache()
    return wrong


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
    wrong = run(options.names or list(models.NAMES), policy)
    print(f"{wrong} wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
