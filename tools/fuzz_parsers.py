"""Coverage-guided fuzzing of the parsers (atheris, libFuzzer).

Run: python -m tools.fuzz_parsers [TARGET ...] [--seconds 120]. The targets are in tools/fuzz_targets.py; each runs in a
separate process. The input of one that fails is written to the directory of --finds, and the exit status is 1. It needs
atheris (pip install atheris), which has wheels for Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = ("requests", "calls", "thinking", "settings", "events", "conversations")
INSTRUMENTED = ["mlxserver", "mlx_lm.tool_parsers"]


def fuzz(target: str, seconds: int, finds: Path) -> None:
    """Run one target; ends the process."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tools.fuzz_targets import TARGETS
    test, seeds = TARGETS[target]
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-max_len=2048", "-timeout=20", "-rss_limit_mb=4096", "-verbosity=1"]
    atheris.Setup([target, *limits, f"-artifact_prefix={finds}/{target}-", str(corpus)], test)
    atheris.Fuzz()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the targets of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *NAMES], metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=120, help="per target")
    parser.add_argument(
        "--finds", type=Path, default=Path(tempfile.gettempdir()) / "finds", help="directory for the inputs of failures"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install atheris (Linux)")
    if arguments.here:
        fuzz(arguments.targets[0], arguments.seconds, arguments.finds)
    arguments.finds.mkdir(parents=True, exist_ok=True)
    options = ["--here", "--seconds", str(arguments.seconds), "--finds", str(arguments.finds)]
    command = [sys.executable, "-m", "tools.fuzz_parsers"]
    failed = [name for name in arguments.targets or NAMES if subprocess.run([*command, name, *options]).returncode]
    print(f"failed: {', '.join(failed)}" if failed else "no find")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
