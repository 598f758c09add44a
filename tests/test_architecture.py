"""The layers of docs/architecture.md: who may import whom, as a table of packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package, and the packages that it may import besides itself. "engine" is its vocabulary: the modules beside its
# packages (requests, conversation, events, sequence, errors, metrics) and the one door to MLX.
ENGINE = "config engine"
ALLOWED = {
    "config": "",
    "engine": "config engine.platform",
    "engine.platform": "engine",
    "engine.kv_cache": "engine engine.platform",
    "engine.output": "engine",
    "engine.prompt": "config engine engine.output",
    "engine.sampling": "config engine engine.output engine.platform",
    "engine.worker": "engine",
    "engine.loading": "config engine engine.platform engine.kv_cache",
    "engine.scheduler": "engine engine.platform engine.kv_cache engine.loading engine.sampling",
    "engine.distributed": "config engine engine.platform engine.kv_cache engine.loading engine.sampling "
    "engine.scheduler",
    "engine.runners": "config engine engine.platform engine.kv_cache engine.loading engine.output engine.prompt "
    "engine.sampling engine.worker engine.scheduler engine.distributed",
    "api": "config engine",
    "page": "",
    "manager": "config engine engine.loading engine.worker",
    "model_manager": "config engine engine.loading manager",
    "server": "config engine engine.loading engine.platform engine.worker api manager model_manager page",
    "cli": "api client config engine engine.loading engine.platform manager model_manager server",
    "__main__": "cli config mlx_api_server",
    "mlx_api_server": "__main__ config engine engine.distributed engine.kv_cache engine.loading engine.platform "
    "engine.runners engine.worker manager model_manager server",
    "client": "api",
    "simple_client": "client",
    "advanced_client": "client",
}
FILES = [*(ROOT / "mlxserver").rglob("*.py"), *ROOT.glob("*.py")]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def package_of(module):
    """The row of the table that a module belongs to."""
    name = module.removeprefix("mlxserver.")
    return max((row for row in ALLOWED if f"{name}.".startswith(f"{row}.")), key=len, default=None)


def imported(path):
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def named(path):
    return str(path.relative_to(ROOT))


def test_the_root_has_the_four_rooms_and_no_other_python():
    rooms = {"mlx_api_server.py", "model_manager.py", "simple_client.py", "advanced_client.py"}
    assert {path.name for path in ROOT.glob("*.py")} == rooms


def test_every_module_belongs_to_a_package_of_the_table():
    assert {module for module in MODULES if package_of(module) is None} == {"mlxserver"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path):
    package = package_of(module_of(path))
    wanted = {package_of(module) for module in imported(path) if module in MODULES} - {None}
    forbidden = wanted - {package, *ALLOWED.get(package, "").split()}
    assert not forbidden, f"{named(path)} may not import {forbidden}"


def is_mlx(module):
    return module.split(".")[0] in ("mlx", "mlx_lm")


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_imports_mlx_comes_through_the_one_door(path):
    tree = ast.parse(path.read_text())
    lines = [
        (node.lineno, [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    mlx = [line for line, modules in lines if any(map(is_mlx, modules))]
    door = [line for line, modules in lines if "mlxserver.engine.mlx" in modules]
    if mlx and path.name != "mlx.py":
        assert door, f"{named(path)} imports MLX past the door"
        assert min(door) < min(mlx)


def test_only_what_the_event_loop_calls_knows_asyncio_in_the_engine():
    engine = ROOT / "mlxserver" / "engine"
    knowing = {str(path.relative_to(engine)) for path in engine.rglob("*.py") if "asyncio" in set(imported(path))}
    assert knowing == {"worker/engine.py", "worker/generation.py", "worker/tokenizer_worker.py"}


@pytest.mark.parametrize("package", ["api", "client", "config"])
def test_the_wire_and_the_settings_know_no_mlx(package):
    for path in (ROOT / "mlxserver" / package).rglob("*.py"):
        assert not [module for module in imported(path) if is_mlx(module)], path
