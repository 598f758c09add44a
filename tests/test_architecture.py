"""Imports point one way: clients -> client -> protocol; mlx_api_server -> server -> model_manager -> engine.

server is where protocol and engine meet.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {
    "engine",
    "protocol",
    "client",
    "model_manager",
    "model_changes",
    "model_watch",
    "model_registry",
    "model_instance",
    "model_life",
    "model_load",
    "model_requests",
    "model_expiry",
    "model_backoff",
    "model_state",
    "model_room",
    "server",
    "mlx_api_server",
    "simple_client",
    "advanced_client",
}
ALLOWED = {
    "protocol": {"protocol"},
    "engine": {"engine"},
    "client": {"client", "protocol"},
    "model_state": set(),
    "model_changes": {"engine"},
    "model_room": {"engine"},
    "model_requests": set(),
    "model_expiry": set(),
    "model_backoff": set(),
    "model_load": {"engine", "model_state"},
    "model_life": {
        "engine",
        "model_backoff",
        "model_expiry",
        "model_load",
        "model_requests",
        "model_room",
        "model_state",
    },
    "model_instance": {"engine", "model_life", "model_load", "model_requests", "model_room", "model_state"},
    "model_watch": {"model_instance", "model_manager"},
    "model_registry": {"engine", "model_instance", "model_state"},
    "model_manager": {
        "engine",
        "model_changes",
        "model_instance",
        "model_load",
        "model_registry",
        "model_room",
        "model_state",
    },
    "server": {"engine", "model_changes", "model_instance", "model_manager", "model_state", "protocol", "server"},
    "mlx_api_server": {"engine", "model_changes", "model_manager", "model_watch", "server"},
    "simple_client": {"client"},
    "advanced_client": {"client"},
}


def modules():
    for name in ALLOWED:
        package = ROOT / name
        yield from (package.glob("*.py") if package.is_dir() else [ROOT / f"{name}.py"])


def imported(path):
    """Top-level names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", [p for p in modules() if p.exists()], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    forbidden = (set(imported(path)) & OURS) - ALLOWED[room]
    assert not forbidden, f"{path.relative_to(ROOT)} may not import {forbidden}"


def test_only_what_the_event_loop_calls_knows_asyncio_in_the_engine():
    knowing = {p.name for p in (ROOT / "engine").glob("*.py") if "asyncio" in set(imported(p))}
    assert knowing == {"worker.py", "clerk.py", "generation.py"}


def test_the_wire_knows_no_mlx():
    for package in ("protocol", "client"):
        for path in (ROOT / package).glob("*.py"):
            assert not {n for n in imported(path) if n.startswith("mlx")}, path
