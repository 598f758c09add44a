"""POST /v1/models/pull: the request and its answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson

from mlxserver.api import sse
from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import Progress
from mlxserver.api.openai.errors import envelope
from mlxserver.api.schema.parameters import Parameter, Request
from mlxserver.api.schema.validators import check_path


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull takes, before its first byte. needed_bytes: memory; None if it could not be loaded."""

    model: str
    download_bytes: int
    needed_bytes: int | None
    fits: bool


class PullRequest(Request):
    """POST /v1/models/pull."""

    model: str = Parameter(
        str, "Repository of the Hugging Face hub: org/name, or org/name@revision.", required=True, check=check_path
    )
    force: bool = Parameter(
        bool, "Download a model that memory is too small for, or of a kind not known.", default=False
    )
    stream: bool = Parameter(bool, "Send the progress as server-sent events.", default=False)


class PullEvents:
    """Encoder of a pull's progress as server-sent events."""

    content_type = "text/event-stream; charset=utf-8"

    def start(self) -> bytes:
        """Nothing: the first event is a step."""
        return b""

    def planned(self, plan: PullPlan) -> bytes:
        """Event before the first byte."""
        return sse.encode(orjson.dumps({"event": "planned", **asdict(plan)}))

    def progress(self, progress: Progress) -> bytes:
        """Event of a step."""
        return sse.encode(orjson.dumps({"event": "progress", **asdict(progress)}))

    def pulled(self, plan: PullPlan, path: str) -> bytes:
        """Last event."""
        return sse.encode(self.complete(plan, path))

    def complete(self, plan: PullPlan, path: str) -> bytes:
        """Body of an answer that is not streamed."""
        return orjson.dumps(pulled(plan, path))

    def failed(self, failure: Failure) -> bytes:
        """Last event of a pull that failed."""
        return sse.encode(envelope(failure))

    def heartbeat(self) -> bytes:
        """Comment, which readers skip."""
        return sse.comment("keep-alive")


def pulled(plan: PullPlan, path: str) -> dict[str, Any]:
    """Answer to a pull; of a streamed one the last event."""
    return {"event": "pulled", **asdict(plan), "path": path}
