"""Options of a request: sampling, stops and the token limit under Ollama's names.

Rule: what chooses the hardware or the context is the server's, so it is accepted without effect; a sampler that is not
here is accepted, too, and noted as ignored if it is switched on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

from mlxserver.api.openai.generation import NO_EFFECT, NOT_APPLIED, STOP, number
from mlxserver.api.schema.parameters import Parameter, Request, ValidationFailed, invalid, json_schema, parse
from mlxserver.api.schema.validators import check_stop
from mlxserver.engine.requests import NO_LIMIT

RANDOM_SEED = -1
LIMIT: dict[str, Any] = {"type": "integer", "minimum": -2, "description": "an integer; 0, -1 and -2 are no limit"}
HARMLESS = (
    *("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "low_vram", "use_mmap", "use_mlock"),
    *("numa", "f16_kv", "mirostat_eta", "mirostat_tau"),
)
OF_FILES = ("logits_all", "vocab_only", "embedding_only", "num_gqa", "rope_frequency_base", "rope_frequency_scale")


def check_limit(value: int, param: str) -> int:
    """Most tokens to generate. Raises ValidationFailed."""
    if not -2 <= value < 2**63:
        raise invalid(param, value, "a number of tokens, or -1 for no limit")
    return value if value > 0 else NO_LIMIT


class Options(Request):
    """The object `options`."""

    __no_effect__: ClassVar = {name: NO_EFFECT[name] for name in HARMLESS} | dict.fromkeys(
        OF_FILES, "how a model is read is known from its files"
    )
    __not_applied__: ClassVar = NOT_APPLIED

    temperature: float | None = number("temperature")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    min_p: float | None = number("min_p")
    seed: int | None = number("seed")
    frequency_penalty: float | None = number("frequency_penalty")
    presence_penalty: float | None = number("presence_penalty")
    repeat_penalty: float | None = number("repetition_penalty")
    num_predict: int | None = Parameter(
        int, "Most tokens to generate, reasoning included; 0, -1 and -2 are no limit.", check=check_limit, shape=LIMIT
    )
    stop: tuple[str, ...] = Parameter(
        object, "Strings at which the answer ends; they are not part of it.", default=(), check=check_stop, shape=STOP
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were given, by their names in SamplingParams."""
        names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")
        stated = {name: getattr(self, name) for name in names}
        stated |= {"repetition_penalty": self.repeat_penalty, "seed": None if self.seed == RANDOM_SEED else self.seed}
        return {name: value for name, value in stated.items() if value is not None}


OPTIONS: dict[str, Any] = json_schema(Options)


def check_options(value: Any, param: str) -> Options:
    """The options. Raises ValidationFailed."""
    if not isinstance(value, dict):
        raise invalid(param, value, "an object")
    try:
        return parse(Options, orjson.dumps(value))
    except ValidationFailed as error:
        raise ValidationFailed(error.message, f"{param}.{error.param}") from None
