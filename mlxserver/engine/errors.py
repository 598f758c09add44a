"""What can go wrong in the engine and the manager, named for what happened. Nothing here knows HTTP.

EngineError
├── ModelNotFound        no such key is registered
├── ModelExists          the key is registered with another source
├── ModelReplaced        the key is being given to another source already
├── ModelNotLoaded       the model is registered, but requests do not load models here
├── LoadFailed           the model could not be loaded; the cause is in the message
├── LoadAborted          the load was called off before it was done
├── NoRoom               the model does not fit in memory; with a projection of what is there
├── PromptRejected       the prompt can't be given to this model; names the field
│   ├── ContextExceeded  it is longer than the context
│   ├── InputTooLong     a text is longer than an embedding model or a reranker takes
│   ├── SeesNoImages     the conversation has images, and the model sees none
│   └── WrongKind        the model is of another kind than the request needs
├── QueueFull            as many requests wait as may; try again later
├── ModelUnloading       the model is leaving; try again later
├── RequestFailed        an unexpected fault met this request alone
├── StepFailed           a step of the engine failed, and with it the requests that were at work
├── OutOfMemory          there was no memory for this request, not even with everything kept given back
├── ModelFailed          the model has failed several times, and is not loaded again before some time
├── ModelBusy            the model has requests, and the caller asked not to wait for them
├── ModelLoaded          the model is loaded, and its files are to be removed
├── ModelStalled         the model can't be unloaded: its engine is stuck in a step
├── EngineStopped        the engine ended before the answer was complete
│   └── EngineUnloaded   because the model was unloaded, or the server stops
├── RankLost             a rank is gone that computed the model together with others
├── ReaderTooSlow        more of a stream waits for its reader than may
└── SourceInvalid        a source of models is at fault (engine/loading/errors.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlxserver.config.errors import abbreviate
from mlxserver.config.settings import Kind


def one_line(error: BaseException) -> str:
    """The message of a foreign error in one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, slots=True)
class Projection:
    """What a load needs and what is there, in bytes. busy, pinned and evictable are held by other models."""

    needed: int
    free: int
    evictable: int
    pinned: int
    busy: int
    budget: int


class EngineError(Exception):
    """Base of all that callers of the engine may meet.

    retry_after: seconds until the same may go well; None where time alone changes nothing.
    """

    retry_after: float | None = None


class ModelNotFound(EngineError):
    """No model is registered under this key. `param` names the field that has it."""

    def __init__(self, model: str, known: Sequence[str]) -> None:
        names = ", ".join(known) if known else "none"
        super().__init__(f"Model {abbreviate(model)} does not exist. Known models: {names}.")
        self.param = "model"


class ModelExists(EngineError):
    """The key is taken by another source."""

    def __init__(self, key: str, source: str, wanted: str) -> None:
        super().__init__(
            f"Model {key!r} is already registered with source {source!r}, not {wanted!r}. "
            "Unload it first, or choose another key."
        )


class ModelReplaced(EngineError):
    """The key is being given to another source already."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Model {key!r} is being replaced already. Wait until that is done.")


class LoadFailed(EngineError):
    """The model could not be loaded. `cause` says why."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"Model {key!r} could not be loaded: {cause}")
        self.cause = cause


class ModelNotLoaded(EngineError):
    """The model is registered and not loaded, and this server loads none for a request."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Model {key!r} is not loaded, and requests do not load models here (load_on_demand is off). "
            "Load it with POST /v1/models/load."
        )


class LoadAborted(EngineError):
    """The load was called off: the model was unloaded, or the server stops."""

    retry_after = 1.0

    def __init__(self, key: str) -> None:
        super().__init__(f"Loading model {key!r} was called off. Try again later.")


class NoRoom(EngineError):
    """The model does not fit in memory. `projection` has the sizes in bytes that say why. where: on another rank."""

    def __init__(self, key: str, projection: Projection, where: str = "") -> None:
        gib = {name: f"{size / 2**30:.2f} GiB" for name, size in asdict(projection).items()}
        model = f"On {where}, model" if where else "Model"
        super().__init__(
            f"{model} {key!r} needs {gib['needed']} and {gib['free']} of {gib['budget']} are free; {gib['evictable']} "
            f"can be evicted, {gib['busy']} are busy, {gib['pinned']} pinned. Unload a model, or lower cache_tokens."
        )
        self.projection = projection


class PromptRejected(EngineError):
    """The prompt can't be given to this model.

    `param` is the path of a field from GenerationRequest, "sampling.logit_bias"; in a message or a tool it is the place
    where the client wrote it, "messages[2].role".
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ContextExceeded(PromptRejected):
    """The prompt is longer than the model's context, counts in tokens.

    Programs look for the words "maximum context length is N tokens", others for "prompt is too long: N tokens > M".
    """

    def __init__(self, prompt_tokens: int, context_length: int, param: str) -> None:
        super().__init__(
            f"The prompt is too long: {prompt_tokens} tokens > {context_length} maximum. This model's maximum context "
            f"length is {context_length} tokens, and the answer needs some of them. Shorten the prompt.",
            param,
        )


class InputTooLong(PromptRejected):
    """A text is longer than an embedding model or a reranker takes, counts in tokens. what: the text in words."""

    code = "context_length_exceeded"

    def __init__(self, tokens: int, context_length: int, param: str, what: str = "") -> None:
        super().__init__(
            f"{what or param} is too long: {tokens} tokens > {context_length} maximum. This model's maximum context "
            f"length is {context_length} tokens. Shorten the text, or set 'truncate' to have it cut.",
            param,
        )


class SeesNoImages(PromptRejected):
    """The prompt has an image, and the model is a text model."""

    def __init__(self, param: str) -> None:
        super().__init__("This is a text model: it sees no images. Leave them out.", param)


class WrongKind(PromptRejected):
    """The model is of another kind than the request needs."""

    code = "wrong_kind"

    def __init__(self, key: str, kind: Kind) -> None:
        super().__init__(f"Model {key!r} is {_KINDS[kind]}", "model")


_KINDS: dict[Kind, str] = {
    "text": "a text model: it answers conversations and goes on from prompts, and makes no embeddings.",
    "vision": "a vision model: it answers conversations with text and images, and makes no embeddings.",
    "embedding": "an embedding model: it makes vectors of texts (POST /v1/embeddings), and generates no text.",
    "rerank": "a reranker: it scores documents for a query (POST /v1/rerank), and generates no text.",
}


class QueueFull(EngineError):
    """As many requests wait for this model as may."""

    def __init__(self, key: str, waiting: int, retry_after: float) -> None:
        super().__init__(f"Model {key!r} has {waiting} requests waiting, its limit. Try again later.")
        self.retry_after = retry_after


class ModelUnloading(EngineError):
    """The model is being unloaded."""

    retry_after = 1.0

    def __init__(self, key: str) -> None:
        super().__init__(f"Model {key!r} is being unloaded. Try again later.")


class RequestFailed(EngineError):
    """An unexpected fault met this request alone; the log has the details."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"Model {key!r} could not process this request: {cause}")


class StepFailed(EngineError):
    """A step of the engine failed, and with it the requests that were at work; the log has the details."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"Model {key!r} failed while it generated this answer: {cause}")


class OutOfMemory(EngineError):
    """Memory ran out in a step, twice, and this request was the youngest at work."""

    retry_after = 1.0

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Memory ran out while model {key!r} worked on this request. Try again later, with a shorter prompt or "
            "fewer requests at once, or lower the model's cache_tokens."
        )


class ModelFailed(EngineError):
    """The model failed several times in a row, and is not loaded again for a request before `retry_after` seconds."""

    def __init__(self, key: str, cause: str, retry_after: float) -> None:
        super().__init__(f"Model {key!r} failed, and is not loaded again at once. Try again later. {cause}")
        self.retry_after = retry_after


class ModelBusy(EngineError):
    """The model has requests, and the caller asked not to wait for them."""

    def __init__(self, key: str, requests: int) -> None:
        super().__init__(f"Model {key!r} has {requests} requests in progress. Unload it with mode 'drain' or 'abort'.")


class ModelLoaded(EngineError):
    """The files of a loaded model are to be removed, which takes force."""

    def __init__(self, key: str) -> None:
        super().__init__(f"Model {key!r} is loaded. Unload it before its files are removed, or force the removal.")


class ModelStalled(EngineError):
    """The model can't be unloaded yet: its engine is stuck in a step. `trouble` says for how long."""

    def __init__(self, key: str, trouble: str) -> None:
        super().__init__(f"Model {key!r} is still being unloaded. {trouble}")


class EngineStopped(EngineError):
    """The engine ended before the answer was complete."""

    retry_after = 1.0

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(f"The engine of model {key!r} stopped: {cause}")


class EngineUnloaded(EngineStopped):
    """The model was unloaded, or the server stopped, before the answer was complete."""

    def __init__(self, key: str) -> None:
        super().__init__(key, "the model was unloaded")


class RankLost(EngineError):
    """A rank is gone, and with it the models that it had a share of."""

    retry_after = 10.0

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}. Models that several ranks share can't be used until all ranks are started again.")


class ReaderTooSlow(EngineError):
    """More events of a stream wait for its reader than may."""

    def __init__(self, most: int) -> None:
        super().__init__(f"The stream was ended: more than {most} of its events waited to be read.")
