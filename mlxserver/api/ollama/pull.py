"""POST /api/pull: the request, and the lines of its progress."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import orjson

from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import ModelStatus, Progress
from mlxserver.api.native.load import derive_key
from mlxserver.api.native.pull import PullPlan
from mlxserver.api.ollama.errors import LINES, envelope
from mlxserver.api.ollama.models import NamedRequest
from mlxserver.api.ollama.names import key_of
from mlxserver.api.schema.parameters import Parameter
from mlxserver.api.schema.validators import KEY
from mlxserver.config.settings import ModelSpec

HUBS = ("hf.co/", "huggingface.co/", "https://huggingface.co/")
START, SUCCESS = {"status": "pulling manifest"}, {"status": "success"}


class OllamaPullRequest(NamedRequest):
    """POST /api/pull."""

    __no_effect__: ClassVar = {"insecure": "connections to the hub are always secure"}

    stream: bool = Parameter(bool, "Send the progress, in lines of JSON.", default=True)

    @property
    def source(self) -> str:
        """The source: a Hugging Face id, also with the hub's name before it."""
        source = key_of(self.asked)
        return next((source.removeprefix(hub) for hub in HUBS if source.startswith(hub)), source)

    @property
    def spec(self) -> ModelSpec:
        """The model to register, under the name that was asked for where that can be a key."""
        key = key_of(self.asked)
        return ModelSpec(key if KEY.fullmatch(key) else derive_key(self.source), self.source)


class PullEncoder:
    """Encoder of a pull's progress. Programs show a bar for lines with a digest: it stands for the source."""

    content_type = LINES

    def __init__(self, source: str) -> None:
        self._digest = hashlib.sha256(source.encode(errors="backslashreplace")).hexdigest()
        self._latest = _line(START)

    def start(self) -> bytes:
        """First line."""
        return _line(START)

    def progress(self, progress: Progress) -> bytes:
        """Line of a step."""
        if progress.stage == "downloading" and progress.total:
            amounts = {"digest": f"sha256:{self._digest}", "total": progress.total, "completed": progress.done}
            self._latest = _line({"status": f"pulling {self._digest[:12]}", **amounts})
        else:
            self._latest = _line({"status": progress.stage})
        return self._latest

    def planned(self, plan: PullPlan) -> bytes:
        """Line before the first byte."""
        return b""

    def pulled(self, plan: PullPlan, path: str) -> bytes:
        """Last line of a pull that is not loaded."""
        return _line(SUCCESS)

    def complete(self, plan: PullPlan, path: str) -> bytes:
        """Body of an answer that is not streamed."""
        return orjson.dumps(SUCCESS)

    def loaded(self, model: ModelStatus) -> bytes:
        """Last line."""
        return _line(SUCCESS)

    def failed(self, failure: Failure) -> bytes:
        """Last line of a pull that failed."""
        return envelope(failure) + b"\n"

    def heartbeat(self) -> bytes:
        """The latest line once more: a line is all that every client takes."""
        return self._latest


def _line(content: object) -> bytes:
    return orjson.dumps(content) + b"\n"
