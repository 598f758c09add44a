"""Sampling parameters: the one declaration of each, with its type, bounds, default and meaning.

All else is derived from it: the parameters of a request and their JSON schema (api/openai/generation.py), the defaults
of a model ([models.KEY.defaults], POST /v1/models/load, generation_config.json) and what ranks exchange. A new
parameter is one field here, and its effect in engine/sampling/sampler.py or draw.py.

Values that are stated somewhere, by name and possibly not all, are a Mapping[str, Any]; SamplingParams has all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from mlxserver.config.fields import PerRequest, Range, Setting, marked, settings_of

BIAS_RANGE = Range(-100, 100)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    top_k, top_p and min_p filter the distribution after the temperature. frequency_penalty and presence_penalty count
    generated tokens, repetition_penalty those of the prompt as well. logit_bias maps token ids to what is added to
    their logits; it is no number, so its form on the wire is in api/openai/generation.py.
    """

    temperature: Annotated[float, Range(0, 2), "Randomness; 0 is greedy."] = 1.0
    top_p: Annotated[float, Range(0, 1, is_open=True), "Keep the likeliest tokens up to this probability."] = 1.0
    top_k: Annotated[int, Range(-1, 2**63 - 1), "Keep this many of the likeliest tokens; 0 and -1 keep all."] = 0
    min_p: Annotated[float, Range(0, 1), "Keep tokens at least this likely, relative to the likeliest."] = 0.0
    seed: Annotated[int | None, Range(-(2**63), 2**63 - 1), PerRequest(), "The same seed gives the same answer."] = None
    frequency_penalty: Annotated[float, Range(-2, 2), "Lowers a token's logit for each time it was generated."] = 0.0
    presence_penalty: Annotated[float, Range(-2, 2), "Lowers a token's logit once it was generated."] = 0.0
    repetition_penalty: Annotated[
        float, Range(0, 100, is_open=True), "Divides the logits of tokens seen in prompt or answer; 1 is off."
    ] = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_k", min(max(self.top_k, 0), 2**31 - 1))  # the sampler's arrays take no more


NUMBERS: Mapping[str, Setting] = settings_of(SamplingParams)  # all but logit_bias
MODEL_DEFAULTS: Mapping[str, Setting] = {
    name: setting for name, setting in NUMBERS.items() if name not in marked(SamplingParams, PerRequest)
}
