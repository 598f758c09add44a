"""The process around MLX: prepared by the one door to it, and by nothing else."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PURE_PACKAGES = ("api", "client", "config", "manager", "server", "engine/worker")
# MLX's figures of memory are metrics, so what serves them needs MLX.
WITH_MLX = {f"mlxserver.server.{name}" for name in ("metrics", "ops", "app", "uvicorn_server")}


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def pure_modules():
    paths = [path for package in PURE_PACKAGES for path in (ROOT / "mlxserver" / package).rglob("*.py")]
    paths += [path for path in (ROOT / "mlxserver" / "engine").glob("*.py") if path.name != "mlx.py"]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return ["model_manager", *sorted(set(names) - WITH_MLX)]


def test_importing_what_computes_nothing_loads_no_mlx_and_leaves_the_process_as_it_was():
    code = f"""if True:
        import importlib, json, os, resource, sys
        def state():
            limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
            return [dict(os.environ), {{name: resource.getrlimit(getattr(resource, name)) for name in limits}}]
        before = state()
        loading = {{}}
        for name in {pure_modules()!r}:
            importlib.import_module(name)
            for library in ("mlx", "mlx_lm"):
                if library in sys.modules:
                    loading.setdefault(library, name)
        print(json.dumps([state() == before, loading]))"""
    is_unchanged, loading = json.loads(in_a_fresh_process(code))
    assert loading == {}, "the first module that loads each library"
    assert is_unchanged


def test_importing_the_engine_never_lowers_the_limit_of_open_files():
    """mlx_lm does, when it is imported."""
    code = """if True:
        import resource
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        import mlxserver.engine.mlx, mlx_lm.utils
        now = resource.getrlimit(resource.RLIMIT_NOFILE)
        print(now[0] >= limits[0], now[1] == limits[1])"""
    assert in_a_fresh_process(code) == "True True"


def test_mlx_and_its_layers_are_as_they_come_until_an_engine_is_built():
    code = """if True:
        import mlx.core as mx, mlx.nn as nn
        def functions():
            return [mx.softmax, mx.fast.scaled_dot_product_attention, mx.fast.rms_norm, mx.fast.rope,
                    nn.Linear.__call__, nn.Embedding.as_linear, nn.RMSNorm.__call__, nn.RoPE.__call__]
        before = functions()
        import mlxserver.engine.runners.builder
        print(functions() == before)"""
    assert in_a_fresh_process(code) == "True"


def test_compiled_kernels_outlive_a_restart_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_SERVER_CACHE", str(tmp_path))
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    code = "import mlxserver.engine.mlx, os; print(os.environ.get('MLX_PTX_CACHE_DIR', ''))"
    expected = str(tmp_path / f"cuda-kernels-{metadata.version('mlx')}") if sys.platform == "linux" else ""
    assert in_a_fresh_process(code) == expected
