"""POST /v1/models/load: the request and its answers."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

import orjson

from mlxserver.api import sse
from mlxserver.api.dialect import Failure
from mlxserver.api.model_status import ModelStatus, Progress
from mlxserver.api.openai.errors import envelope
from mlxserver.api.openai.generation import KEEP_ALIVE, SamplingRequest
from mlxserver.api.openai.models import estimate_object
from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, abbreviate, invalid, parse
from mlxserver.api.schema.validators import check_keep_alive, check_key, check_path
from mlxserver.config.fields import Internal, marked
from mlxserver.config.load import is_alias
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import (
    KV_GROUP_SIZES,
    POLICY_FIELDS,
    Kind,
    KVBits,
    ModelSpec,
    Speculation,
    UnclosedThinking,
    Weights,
)


def check_defaults(value: Any, param: str) -> dict[str, float]:
    """Sampling parameters by name, each as a request would give it."""
    if not isinstance(value, dict):
        raise invalid(param, value, "an object")
    for name in value:
        if name not in MODEL_DEFAULTS:
            raise ValidationFailed(
                f"Unknown default {abbreviate(name)}. Expected some of {', '.join(MODEL_DEFAULTS)}.",
                f"{param}.{name[:64]}",
            )
    try:
        asked = parse(SamplingRequest, orjson.dumps({"model": "", **value}))
    except ValidationFailed as error:
        raise ValidationFailed(error.message, f"{param}.{error.param}") from None
    return asked.sampling


def check_policy(value: Any, param: str) -> dict[str, bool]:
    """Fields of the policy by name."""
    if not isinstance(value, dict):
        raise invalid(param, value, "an object")
    for name, chosen in value.items():
        if name not in POLICY_FIELDS:
            expected = f"Expected some of {', '.join(POLICY_FIELDS)}."
            raise ValidationFailed(f"Unknown field {abbreviate(name)}. {expected}", f"{param}.{name[:64]}")
        if type(chosen) is not bool:
            raise invalid(f"{param}.{name}", chosen, "a boolean")
    if value.get("compile_steps") and value.get("pad_slots") is False:
        raise invalid(f"{param}.pad_slots", False, "true, which compile_steps needs")
    return value


def check_aliases(value: Any, param: str) -> tuple[str, ...]:
    """Names, and patterns of names."""
    if not isinstance(value, list) or not all(isinstance(name, str) and is_alias(name) for name in value):
        raise invalid(param, value, "a list of names and patterns such as 'gpt-*'")
    return tuple(value)


def check_kv_bits(value: Any, param: str) -> Any:
    """Bits that a quantised KV cache can have."""
    return _chosen(value, param, get_args(KVBits))


def check_kv_group_size(value: Any, param: str) -> Any:
    """Values that can share a scale."""
    return _chosen(value, param, KV_GROUP_SIZES)


def _chosen(value: Any, param: str, choices: tuple[int, ...]) -> Any:
    if value not in choices:
        raise invalid(param, value, f"one of {', '.join(map(str, choices))}")
    return value


class LoadRequest(Request):
    """POST /v1/models/load."""

    model: str = Parameter(
        str,
        "Source: Hugging Face id, MLX directory, .gguf file or embedded:NAME; or the key of a registered model.",
        required=True,
        check=check_path,
    )
    key: str | None = Parameter(str, "Name of the model in requests; by default made from the source.", check=check_key)
    kind: Kind | None = Parameter(
        str, "What the model makes of a text; by default found from its files.", enum=[*get_args(Kind)]
    )
    type: Literal["thinking", "instruction"] | None = Parameter(
        str, "How the model is prompted; by default found out.", enum=["thinking", "instruction"]
    )
    adapter: str | None = Parameter(str, "Directory of a LoRA adapter.", check=check_path)
    context_length: int | None = Parameter(
        int, "Longest context in tokens; by default the model's own, as far as memory goes.", ge=1
    )
    min_context: int | None = Parameter(int, "Tokens of one request whose KV cache is reserved with the model.", ge=16)
    max_running: int | None = Parameter(int, "Requests that decode together.", ge=1)
    max_waiting: int | None = Parameter(int, "Requests that may wait for a place.", ge=0)
    cache_tokens: int | None = Parameter(
        int, "Most tokens whose keys and values all requests together may hold.", ge=16
    )
    prefix_cache_bytes: int | None = Parameter(int, "Bytes that the prefix cache may keep in memory.", ge=0)
    checkpoint_interval: int | None = Parameter(
        int, "Tokens between the checkpoints of a long prompt, where the KV cache can't be trimmed.", ge=16
    )
    kv_bits: Literal[4, 8] | None = Parameter(
        int, "Bits of a quantised KV cache, 4 or 8; by default keys and values are not quantised.", check=check_kv_bits
    )
    kv_group_size: Literal[32, 64, 128] | None = Parameter(
        int, "Values that share a scale then: 32, 64 or 128.", check=check_kv_group_size
    )
    weights: Weights = Parameter(
        str,
        "How quantized weights are held in memory; by default as is fastest.",
        enum=[*get_args(Weights)],
        default="auto",
    )
    unclosed_thinking: UnclosedThinking | None = Parameter(
        str,
        "What an answer is that the model ended inside its reasoning: that, or its content as well.",
        enum=[*get_args(UnclosedThinking)],
    )
    aliases: tuple[str, ...] = Parameter(
        object,
        "More names in requests, and patterns of names.",
        default=(),
        check=check_aliases,
        shape={"type": "array", "items": {"type": "string"}},
    )
    shard: Literal["tensor", "pipeline"] | None = Parameter(
        str,
        "How all ranks share the model: each has a part of every layer, or some layers. By default rank 0 has it.",
        enum=["tensor", "pipeline"],
    )
    pin: bool = Parameter(bool, "Never evict the model, nor unload it for being idle.", default=False)
    ttl: float | None = Parameter(
        object,
        "How long the model stays without a request: seconds or a duration such as '5m'; below zero is for ever.",
        check=check_keep_alive,
        shape=KEEP_ALIVE,
    )
    defaults: dict[str, float] = Parameter(
        object,
        "Sampling parameters for requests that do not give them.",
        default={},
        check=check_defaults,
        shape={"type": "object", "additionalProperties": {"type": "number"}},
    )
    speculation: Speculation = Parameter(
        str,
        "Whether tokens are drafted from the prompt and the answer, and verified together; by default where it pays.",
        enum=[*get_args(Speculation)],
        default="auto",
    )
    draft: str | None = Parameter(
        str, "Key of a registered, smaller model of the same vocabulary that drafts tokens, too.", check=check_key
    )
    mtp: bool = Parameter(
        bool, "Whether a head of the checkpoint that predicts more tokens drafts them, without a draft.", default=True
    )
    policy: dict[str, bool] = Parameter(
        object,
        "Fields of the device's policy that are fixed for this model.",
        default={},
        check=check_policy,
        shape={"type": "object", "additionalProperties": {"type": "boolean"}},
    )
    replace: bool = Parameter(
        bool, "Take the place of another source under this key, which is put back if this one fails.", default=False
    )
    stream: bool = Parameter(bool, "Tell the progress as server-sent events.", default=False)

    @property
    def spec(self) -> ModelSpec:
        """The model to load; what is not stated is as ModelSpec has it. Raises ValidationFailed without any key."""
        stated = {name: value for name in SPEC_FIELDS if (value := getattr(self, name)) is not None}
        return ModelSpec(self.key or derive_key(self.model), self.model, **stated)


# Fields of ModelSpec that a load may state, but for these; `preload` concerns the start.
_NOT_STATED = ("key", "source", "preload", *marked(ModelSpec, Internal))
SPEC_FIELDS = tuple(each.name for each in fields(ModelSpec) if each.name not in _NOT_STATED)


class LoadEvents:
    """Encoder of a load's progress as server-sent events."""

    content_type = "text/event-stream; charset=utf-8"

    def start(self) -> bytes:
        """Nothing: the first event is a step."""
        return b""

    def progress(self, progress: Progress) -> bytes:
        """Event of a step."""
        return sse.encode(orjson.dumps(load_progress(progress)))

    def loaded(self, model: ModelStatus) -> bytes:
        """Last event."""
        return sse.encode(orjson.dumps(loaded(model)))

    def failed(self, failure: Failure) -> bytes:
        """Last event of a load that failed."""
        return sse.encode(envelope(failure))

    def heartbeat(self) -> bytes:
        """Comment, which readers skip."""
        return sse.comment("keep-alive")


def loaded(model: ModelStatus) -> dict[str, Any]:
    """Answer to a load; of a streamed one the last event."""
    return {
        "event": "loaded",
        "key": model.key,
        "status": "loaded",
        "load_time_seconds": round(model.load_seconds, 3),
        "memory_bytes": model.memory_bytes,
        "reserved_bytes": model.reserved_bytes,
        "estimate": estimate_object(model.estimate),
    }


def load_progress(progress: Progress) -> dict[str, Any]:
    """Event of a streamed load."""
    return {"event": "progress", **asdict(progress)}


def derive_key(source: str) -> str:
    """The key of a source that was given none: its last part, "org/Name-4bit" -> "name-4bit".

    Raises ValidationFailed where nothing is left of it.
    """
    name = re.split(r"[/\\:]", source.strip().rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    key = re.sub(r"[^a-z0-9._-]+", "-", name).strip("-.")[:128]
    if not key:
        raise ValidationFailed(f"No key can be made from the source {abbreviate(source)}. Give one as 'key'.", "key")
    return key
