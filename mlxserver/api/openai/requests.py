"""Engine's words for what all generating requests of OpenAI's API share."""

from __future__ import annotations

from mlxserver.api.openai.generation import GeneratingRequest
from mlxserver.engine.requests import SamplingOptions


def sampling_options(request: GeneratingRequest) -> SamplingOptions:
    """Sampling of a request; what it does not state is left to the model's defaults."""
    return SamplingOptions(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
    )
