"""Parameters of every request that generates text: model, sampling, stops, and how the answer is sent.

Rule: a default of None leaves the matter to the model's own defaults.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from math import inf, isfinite
from types import new_class
from typing import Any, ClassVar

from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, abbreviate, invalid
from mlxserver.api.schema.validators import (
    MAX_STOPS,
    STREAM_OPTIONS,
    check_keep_alive,
    check_stop,
    check_stream_options,
)
from mlxserver.config.fields import Range
from mlxserver.config.sampling_params import BIAS_RANGE, NUMBERS, SamplingParams
from mlxserver.engine.requests import NO_LIMIT

MAX_PROMPT_LOGPROBS = 20
MAX_CHOICES = 128  # of any server; this one may set a lower limit (api/schema/limits.py)
STOP: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1}},
    ]
}
TOKEN_ID = re.compile(r"[0-9]{1,9}")
LOGIT_BIAS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": BIAS_RANGE.minimum, "maximum": BIAS_RANGE.maximum},
}
UNLIMITED = (-1, -2)  # of LM Studio, llama.cpp and Ollama
TOKEN_LIMIT: dict[str, Any] = {"type": "integer", "anyOf": [{"enum": [*UNLIMITED]}, {"minimum": 1}]}
UNASKED: Mapping[str, str] = {  # what programs send, whatever the API; a request may declare more of one
    **dict.fromkeys(("cache_control", "context_management", "prompt_cache_options"), "prefixes are kept anyway"),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), "prefixes are kept as long as there is memory"),
    **dict.fromkeys(("client_metadata", "metadata", "safety_identifier", "store", "user"), "nothing is recorded"),
    "include": "an answer has all that there is",
    "service_tier": "there is one tier",
    "verbosity": "ask for it in a system message",
}
NO_EFFECT: Mapping[str, str] = {
    "num_ctx": "the context is a setting of the model",
    "num_keep": "a conversation is never cut",
    **dict.fromkeys(
        ("num_batch", "num_gpu", "main_gpu", "num_thread", "low_vram", "use_mmap", "use_mlock", "numa", "f16_kv"),
        "how a model runs is the server's to choose",
    ),
    **dict.fromkeys(("mirostat_eta", "mirostat_tau"), "figures of mirostat"),
}
NOT_APPLIED: Mapping[str, Collection[Any]] = {  # samplers that are not here, with the values that turn them off
    "mirostat": (0,),
    "tfs_z": (0, 1),
    "typical_p": (0, 1),
    "repeat_last_n": (0, -1),
    "penalize_newline": (True,),
}
KEEP_ALIVE: dict[str, Any] = {"anyOf": [{"type": "number"}, {"type": "string"}]}


def check_logit_bias(value: Any, param: str) -> dict[int, float]:
    """Token ids and the addend to their logits. Raises ValidationFailed."""
    if not isinstance(value, dict):
        raise invalid(param, value, "an object of token ids and numbers")
    for token, bias in value.items():
        if not TOKEN_ID.fullmatch(token):
            raise invalid(param, token, "token ids (decimal digits) as its keys")
        if type(bias) not in (int, float) or bias not in BIAS_RANGE:
            raise invalid(f"{param}.{token}", bias, f"a number {BIAS_RANGE}")
    return {int(token): float(bias) for token, bias in value.items()}


def check_limit(value: int, param: str) -> int:
    """Most tokens to generate, or one of UNLIMITED. Raises ValidationFailed."""
    if not 0 < value < 2**63 and value not in UNLIMITED:
        raise invalid(param, value, "an integer at least 1, or -1 for no limit")
    return value


def stated_limit(value: int | None) -> int | None:
    """Most tokens to generate as the engine takes it: NO_LIMIT for one of UNLIMITED, None where none is stated."""
    return NO_LIMIT if value in UNLIMITED else value


def one_of(values: Mapping[str, Any]) -> Any:
    """The one value that parameters of several names state; None where none does. Raises ValidationFailed."""
    stated = {name: value for name, value in values.items() if value is not None}
    first = next(iter(stated), "")
    for name, value in stated.items():
        if value != stated[first]:
            both = f"'{first}' is {abbreviate(stated[first])} but '{name}' {abbreviate(value)}"
            raise ValidationFailed(f"{both}. Send one of them.", first)
    return stated.get(first)


def keep_alive_parameter() -> Any:
    """The parameter `keep_alive` of a request, whatever its API."""
    return Parameter(
        object,
        "How long the model stays loaded after this: seconds or a duration such as '5m'; below zero is for ever.",
        check=check_keep_alive,
        shape=KEEP_ALIVE,
    )


class ModelRequest(Request):
    """A request to one model. It takes what is UNASKED, too, with any value where it declares nothing of it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
        taken = {**UNASKED, **cls.__no_effect__}
        cls.__no_effect__ = {name: why for name, why in taken.items() if name not in declared}

    model: str = Parameter(str, "Key of the model that answers.", required=True)


def _declare_numbers(namespace: dict[str, Any]) -> None:
    namespace["__annotations__"] = dict.fromkeys(NUMBERS, object)
    for name in NUMBERS:
        namespace[name] = number(name)


def number(name: str, description: str = "") -> Any:
    """The parameter of a request for a sampling parameter that is a number; by default it is described as declared."""
    setting = NUMBERS[name]
    return Parameter(setting.type, description or setting.meaning, **_bounds(setting.range or Range(-inf)))


def _bounds(range: Range) -> dict[str, Any]:
    bounds = {"gt" if range.is_open else "ge": range.minimum, "le": range.maximum}
    return {name: bound for name, bound in bounds.items() if isfinite(bound)}


_Numbers: Any = new_class("_Numbers", (ModelRequest,), exec_body=_declare_numbers)


class SamplingRequest(_Numbers):  # type: ignore[misc]
    """How the next token is chosen. Its numbers are declared by config/sampling_params.py."""

    logit_bias: dict[int, float] | None = Parameter(
        object, "Token ids and what is added to their logits.", check=check_logit_bias, shape=LOGIT_BIAS
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters that were given, by name."""
        values = ((name, getattr(self, name)) for name in SamplingParams.__slots__)
        return {name: value for name, value in values if value is not None}


class GeneratingRequest(SamplingRequest):
    """A request that generates text."""

    __no_effect__: ClassVar = NO_EFFECT
    __not_applied__: ClassVar = NOT_APPLIED

    max_tokens: int | None = Parameter(
        int, "Most tokens to generate, reasoning included; -1 is no limit.", check=check_limit, shape=TOKEN_LIMIT
    )
    num_predict: int | None = Parameter(int, "Another name of max_tokens.", check=check_limit, shape=TOKEN_LIMIT)
    repeat_penalty: float | None = number("repetition_penalty", "Another name of repetition_penalty.")
    min_tokens: int = Parameter(int, "Tokens to generate before the model may end its answer.", default=0, ge=0)
    ignore_eos: bool = Parameter(bool, "Go on when the model ends its answer, up to max_tokens.", default=False)
    stop: tuple[str, ...] = Parameter(
        object, "Strings at which the answer ends; they are not part of it.", default=(), check=check_stop, shape=STOP
    )
    n: int = Parameter(int, "How many answers.", default=1, ge=1, le=MAX_CHOICES)
    stream: bool = Parameter(bool, "Send tokens as they are made, as server-sent events.", default=False)
    stream_options: dict[str, bool] = Parameter(
        object,
        "include_usage: token counts at the end. continuous_usage_stats: in every chunk, counting sent pieces.",
        default={},
        check=check_stream_options,
        shape=STREAM_OPTIONS,
    )
    keep_alive: float | None = keep_alive_parameter()
    prompt_logprobs: int | None = Parameter(
        int,
        "Tell each token of the prompt with its log-probability, and this many of the likeliest ones; not in streams.",
        ge=0,
        le=MAX_PROMPT_LOGPROBS,
    )
    user: str | None = Parameter(str, "Accepted without effect.")
    metadata: dict[str, Any] | None = Parameter(dict, "Accepted without effect.")
    store: bool | None = Parameter(bool, "Accepted without effect.")
    service_tier: str | None = Parameter(str, "Accepted without effect.")
    safety_identifier: str | None = Parameter(str, "Accepted without effect.")
    prompt_cache_key: str | None = Parameter(str, "Accepted without effect.")

    @property
    def token_limits(self) -> dict[str, int | None]:
        """Most tokens to generate, by each name that such a limit has."""
        return {"max_tokens": self.max_tokens, "num_predict": self.num_predict}

    @cached_property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None where none is stated. Raises ValidationFailed if limits differ."""
        limits = self.token_limits
        stated = one_of({name: limit for name, limit in limits.items() if limit not in UNLIMITED})
        return NO_LIMIT if stated is None and any(limit in UNLIMITED for limit in limits.values()) else stated

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given, by name. Raises ValidationFailed if two names of one differ."""
        stated = super().sampling
        names = {"repetition_penalty": self.repetition_penalty, "repeat_penalty": self.repeat_penalty}
        penalty = one_of(names)
        return stated if penalty is None else stated | {"repetition_penalty": penalty}

    @property
    def counts_pieces(self) -> bool:
        """Whether every chunk of the stream has token counts."""
        return self.stream_options.get("continuous_usage_stats", False)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options.get("include_usage", False) or self.counts_pieces

    def check_together(self) -> None:
        """Refuse what differs under two names, a lower limit above the upper one, options of a stream that is none."""
        limit, _ = self.token_limit, self.sampling
        if limit is not None and self.min_tokens > limit:
            raise invalid("min_tokens", self.min_tokens, f"at most {limit}, the most tokens to generate")
        if self.stream_options and not self.stream:
            raise ValidationFailed("'stream_options' needs 'stream': true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ValidationFailed("'prompt_logprobs' can't be had with 'stream'.", "prompt_logprobs")
