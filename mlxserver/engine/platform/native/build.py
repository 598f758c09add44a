"""Build of the native kernels: compiles them for the installed MLX, into the environment.

MLX's Python types are shared with an extension only if nanobind has the same internals version (22 for MLX 0.32.4:
nanobind 3.0 and 3.1) and its domain is "mlx".

Rule: a module's name has the digest of all that it is made of, so that one built from other sources is never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path

from mlxserver.engine.platform.openblas import is_wanted as is_wanted

_SOURCES = Path(__file__).parent
_OPERATIONS, _KERNELS = (
    ("module", "products", "layers", "sdpa", "decoder", "sampling", "scan"),
    ("quantized", "dense", "functions", "attention", "decode_attention", "affine", "logits", "recurrence"),
)
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
_X86_LEVELS = {"avx2": (8, "-mavx2 -mfma -mf16c"), "avx512": (16, _AVX512)}
_OPTIONS = "-O3 -fPIC -std=c++20 -fvisibility=hidden -ffp-contract=fast -DNB_DOMAIN=mlx"
COMMAND = f"{shlex.quote(sys.executable)} -m mlxserver.engine.platform.native.build"


@functools.cache
def module_name() -> str:
    """Name of the extension module. Raises PackageNotFoundError without MLX.

    The digest is that of the sources, this file with its flags, and the versions of MLX and of the interpreter.
    """
    digest = hashlib.sha256(f"{metadata.version('mlx')} {sys.version_info} {platform.machine()}".encode())
    for file in sorted(_SOURCES.iterdir()):
        if file.suffix in (".cpp", ".h") or file.name == Path(__file__).name:
            digest.update(file.read_bytes())
    return f"mlxserver_native_{digest.hexdigest()[:16]}"


def missing() -> str | None:
    """The line that installs what the kernels, which are not built, are to be built with, and builds them; None where
    they are built or not wanted.
    """
    if not is_wanted() or util.find_spec(module_name()):
        return None
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    steps = [] if _compiler() else ["apt-get install g++ (Fedora: dnf install gcc-c++)"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        steps.append(f"apt-get install {python}-dev (Fedora: dnf install {python}-devel)")
    if util.find_spec("nanobind") is None:
        steps.append(f"{shlex.quote(sys.executable)} -m pip install nanobind==3.1.0")
    return ", then ".join([*steps, COMMAND])


def build(target: Path) -> None:
    """Compile the extension into a directory. Raises OSError, CalledProcessError."""
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    mlx = _package("mlx")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = list(_compilations(compiler, mlx, Path(folder)))
        for done in [pool.submit(_run, command) for command in commands]:
            done.result()
        built = Path(folder) / f"{module_name()}.so"
        libraries = [f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}", "-pthread"]
        _run([compiler, "-shared", *(command[-1] for command in commands), *libraries, "-o", str(built)])
        partial = target / f"{built.name}.{os.getpid()}.partial"
        shutil.copy(built, partial)
        partial.replace(target / built.name)


def _compilations(compiler: str, mlx: Path, folder: Path) -> Iterator[list[str]]:
    """The command of each object file, whose path is the last word; those that take longest first."""
    nanobind, levels = _package("nanobind"), {"portable": (4, "")}
    if platform.machine() == "x86_64":
        levels |= _X86_LEVELS
    places = (nanobind / "include", nanobind / "ext/robin_map/include", mlx / "include", sysconfig.get_path("include"))
    units = [(_SOURCES / f"{name}.cpp", f"-DMODULE={module_name()} -O1") for name in _OPERATIONS]
    units += [(nanobind / "src/nb_combined.cpp", "-O1")]
    units += [
        (_SOURCES / f"{kernel}.cpp", f"-DLEVEL={name} -DLANES={lanes} {flags}")
        for kernel in _KERNELS
        for name, (lanes, flags) in levels.items()
    ]
    for n, (source, flags) in enumerate(units):
        options = [*shlex.split(f"{_OPTIONS} {flags}"), *(f"-I{place}" for place in places)]
        yield [compiler, *options, "-c", str(source), "-o", str(folder / f"{n}.o")]


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {name} is missing")
    return Path(next(iter(spec.submodule_search_locations)))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def main() -> int:
    """Build into the environment, if that is wanted and not done. Without a compiler or its headers the server does
    without, and `mlx-server doctor` has the line that installs them; any other failure is one line.
    """
    if not is_wanted() or util.find_spec(module_name()):
        return 0
    try:
        build(Path(sysconfig.get_path("platlib")))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
        if "Python.h" not in reason:
            print(f"No native kernels: {reason.strip()}", file=sys.stderr)
    except OSError as error:
        if _compiler() and util.find_spec("nanobind"):
            print(f"No native kernels: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
