"""Build of the native kernels: compiles them for the installed MLX, into the environment.

MLX's Python types are shared with an extension only if nanobind has the same internals version (22 for MLX 0.32.4:
nanobind 3.0 and 3.1) and its domain is "mlx".
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata, util
from pathlib import Path

_SOURCES = Path(__file__).parent
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
_X86_LEVELS = {"avx2": (8, "-mavx2 -mfma"), "avx512": (16, _AVX512)}
_OPTIONS = "-O3 -fPIC -std=c++20 -fvisibility=hidden -ffp-contract=fast -DNB_DOMAIN=mlx"


def module_name() -> str:
    """Name of the extension module for the installed MLX."""
    return "mlxserver_native_" + metadata.version("mlx").replace(".", "_").replace("+", "_")


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {name} is missing")
    return Path(next(iter(spec.submodule_search_locations)))


def build(target: Path) -> None:
    """Compile the extension into a directory. Raises OSError, CalledProcessError."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    nanobind, mlx, levels = _package("nanobind"), _package("mlx"), {"portable": (4, "")}
    if sysconfig.get_platform().endswith("x86_64"):
        levels |= _X86_LEVELS
    places = (nanobind / "include", nanobind / "ext/robin_map/include", mlx / "include", sysconfig.get_path("include"))
    includes = [f"-I{place}" for place in places]
    units = [(nanobind / "src/nb_combined.cpp", ""), (_SOURCES / "quantized.cpp", f"-DMODULE={module_name()}")]
    units += [
        (_SOURCES / "kernel.cpp", f"-DNAME=product_{name} -DLANES={lanes} {flags}")
        for name, (lanes, flags) in levels.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for n, (source, flags) in enumerate(units):
            objects.append(f"{folder}/{n}.o")
            _run([compiler, *shlex.split(f"{_OPTIONS} {flags}"), *includes, "-c", str(source), "-o", objects[-1]])
        built = Path(folder) / (module_name() + ".so")
        libraries = [f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}", "-pthread"]
        _run([compiler, "-shared", *objects, *libraries, "-o", str(built)])
        shutil.copy(built, target / (built.name + ".partial"))
        (target / (built.name + ".partial")).replace(target / built.name)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> int:
    """Build into the environment. A failure is one line; the server does without."""
    if sys.platform != "linux":
        return 0
    try:
        build(Path(sysconfig.get_path("platlib")))
    except subprocess.CalledProcessError as error:
        print(f"No native kernels: {(error.stderr or '').strip().partition(chr(10))[0]}", file=sys.stderr)
    except (OSError, metadata.PackageNotFoundError) as error:
        print(f"No native kernels: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
