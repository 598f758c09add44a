"""Options of a benchmark, the same for the command line and for the shell's /bench."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlxserver.client.bench.figures import check_output
from mlxserver.client.bench.plan import PROMPTS, Plan, parse_slo, read_prompts, user
from mlxserver.client.bench.plots import check_picture
from mlxserver.client.errors import SettingInvalid

DEFAULT_MAX_TOKENS = 128

Number = TypeVar("Number", int, float)


def add_options(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Add all options except the models and --max-tokens."""
    parser.add_argument("--prompt-file", metavar="FILE", type=Path, help="one prompt per line, or messages in .jsonl")
    parser.add_argument(
        "--concurrency", metavar="N,N", type=_list(int), help="requests running at any time (default: 1,4,16)"
    )
    parser.add_argument(
        "--rate", metavar="R,R", type=_list(float), help="requests per second instead, Poisson arrivals"
    )
    parser.add_argument("--requests", metavar="N", type=_positive(int), help="requests per load (default: 32)")
    parser.add_argument("--warmup", metavar="N", type=_count, help="warm-up requests before each load (default: 2)")
    parser.add_argument("--seed", metavar="N", type=int, help="of the order of prompts and of arrivals (default: 0)")
    parser.add_argument(
        "--slo", metavar="LIMITS", help='count requests within limits in ms: "ttft=500,itl=50,e2e=5000"'
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the figures as .json or .csv")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the figures as .png")


def make_plan(options: Namespace, models: tuple[str, ...], params: Mapping[str, Any]) -> Plan:
    """The plan of the options. Raises SettingInvalid, FileUnusable."""
    if options.rate and options.concurrency:
        raise SettingInvalid("--rate", "with --concurrency", "one of the two")
    if options.output:
        check_output(options.output)
    if options.plot:
        check_picture(options.plot)
    prompts = read_prompts(options.prompt_file) if options.prompt_file else tuple(map(user, PROMPTS))
    given = {"concurrency": options.concurrency, "rates": options.rate, "seed": options.seed}
    given |= {"requests": options.requests, "warmup": options.warmup}
    return Plan(
        models,
        prompts,
        slo=parse_slo(options.slo) if options.slo else None,
        params={"max_tokens": DEFAULT_MAX_TOKENS, **params},
        **{name: value for name, value in given.items() if value is not None},
    )


def _list(kind: Callable[[str], Number]) -> Callable[[str], tuple[Number, ...]]:
    return lambda text: tuple(_positive(kind)(part) for part in text.split(","))


def _positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind("0")
        if not 0 < value < float("inf"):
            raise ArgumentTypeError(f"{text!r} is not valid; expected a number above 0")
        return value

    return read


def _count(text: str) -> int:
    return 0 if text.strip() == "0" else _positive(int)(text)
