"""The engine's words for what the wire asks, and the wire's words for what the engine says. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from mlxserver.api import model_responses, responses, schemas
from mlxserver.config.http import HttpSettings
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.conversation import Message
from mlxserver.engine.events import Timings, TokenLogprob, Usage
from mlxserver.engine.requests import (
    ChatPrompt,
    GenerationRequest,
    JsonFormat,
    Prompt,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
)
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import LoadProgress

FINGERPRINT = f"mlx-{version('mlx')}-lm-{version('mlx-lm')}"
LEAST_LOGPROB = -9999.0  # what OpenAI sends for a token that can't be; JSON has no infinity


def chat_request(request: schemas.ChatCompletionRequest) -> GenerationRequest:
    """What a chat asks of the engine."""
    mode, name = request.tool_choice
    return GenerationRequest(
        chat_prompt(request, request.messages),
        request.sampling,
        request.token_limit,
        request.stop,
        n=request.n,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        top_logprobs=request.top_logprobs or 0 if request.logprobs else None,
        format=None if request.response_format is None else JsonFormat(request.response_format["schema"]),
        tool_choice=ToolChoice(mode, name, request.parallel_tool_calls),  # type: ignore[arg-type]
        thinking_budget=request.thinking_budget,
    )


def completion_requests(request: schemas.CompletionRequest) -> list[GenerationRequest]:
    """What a bare completion asks of the engine, prompt by prompt."""
    return [
        GenerationRequest(
            bare_prompt(prompt),
            request.sampling,
            request.token_limit,
            request.stop,
            n=request.n,
            min_tokens=request.min_tokens,
            ignore_eos=request.ignore_eos,
            top_logprobs=request.logprobs,
        )
        for prompt in request.prompt
    ]


def chat_prompt(request: schemas.PromptRequest, messages: tuple[Message, ...]) -> ChatPrompt:
    """Messages with all that is said of how to set them. The effort "none" is what templates call enable_thinking."""
    effort = request.reasoning_effort
    thinking = {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort} if effort else {}
    return ChatPrompt(
        messages, request.tools, {**thinking, **request.chat_template_kwargs}, request.continue_final_message
    )


def bare_prompt(prompt: str | tuple[int, ...]) -> Prompt:
    """Text or tokens to go on from."""
    return TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(prompt)


def total(usages: Sequence[Usage]) -> Usage:
    """One request's counts and times, from those of its prompts, which were worked on side by side."""
    if len(usages) == 1:
        return usages[0]
    times = [usage.timings for usage in usages]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        Timings(max(t.queue for t in times), max(t.prompt for t in times), max(t.generation for t in times)),
    )


def usage(usage: Usage) -> dict[str, Any]:
    """Token counts."""
    return responses.usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cached_tokens=usage.cached_tokens,
    )


def timings(usage: Usage) -> dict[str, Any]:
    """Where the time went."""
    return responses.timings(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        queue_seconds=usage.timings.queue,
        prompt_seconds=usage.timings.prompt,
        generation_seconds=usage.timings.generation,
    )


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log-probabilities as chats have them."""
    return [
        responses.token_logprob(
            token.text,
            token.bytes,
            max(token.logprob, LEAST_LOGPROB),
            [responses.token_logprob(top.text, top.bytes, max(top.logprob, LEAST_LOGPROB)) for top in token.top],
        )
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Log-probabilities as bare completions have them. The chosen token is always among the likeliest.

    offset is the place of the first token in the text, in characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.decode(token.bytes))
    return responses.text_logprobs(
        [token_name(token) for token in tokens],
        [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        [{token_name(t): max(t.logprob, LEAST_LOGPROB) for t in (*token.top, token)} for token in tokens],
        offsets,
    )


def token_name(token: TokenLogprob) -> str:
    """A token's text; its bytes, as OpenAI spells them, where they are no text by themselves."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def model(instance: ModelInstance) -> dict[str, Any]:
    """A registered model."""
    facts = instance.facts
    return model_responses.model(
        instance.spec.key,
        created=instance.created,
        status=instance.status,
        source=instance.spec.source,
        type=facts.type if facts else instance.spec.type,
        context_length=facts.context_length if facts else instance.spec.context_length,
        capabilities=facts.capabilities if facts else None,
        memory_bytes=facts.weight_bytes if facts else 0,
        reserved_bytes=instance.reserved_bytes,
        estimate=estimate(instance),
        running=instance.running,
        queued=instance.waiting,
        aliases=instance.spec.aliases,
        is_pinned=instance.spec.pin,
        expires_in=instance.expires_in,
        loading=progress(instance.load_progress) if instance.status == "loading" else None,
        failure=instance.failure_reason,
    )


def loaded(instance: ModelInstance) -> dict[str, Any]:
    """A model that is loaded now."""
    return model_responses.loaded(
        instance.key,
        load_time_seconds=instance.load_seconds,
        memory_bytes=instance.facts.weight_bytes if instance.facts else 0,
        reserved_bytes=instance.reserved_bytes,
        estimate=estimate(instance),
    )


def estimate(instance: ModelInstance) -> dict[str, int] | None:
    """What a model was expected to take; None before anybody asked."""
    return None if instance.estimate is None else model_responses.estimate(**asdict(instance.estimate))


def progress(progress: LoadProgress) -> dict[str, Any]:
    """How far a load is."""
    return model_responses.progress(progress.stage, progress.done, progress.total)


def limits(settings: HttpSettings) -> schemas.Limits:
    """What the settings say of one request."""
    return schemas.Limits(
        values=settings.max_json_values,
        depth=settings.max_json_depth,
        messages=settings.max_messages,
        prompt_bytes=settings.max_prompt_bytes,
        stops=settings.max_stop_strings,
        biases=settings.max_logit_bias,
        choices=settings.max_choices,
    )


def model_spec(request: schemas.LoadRequest) -> ModelSpec:
    """The model that a load asks for. What is not said is as ModelSpec has it."""
    said = {
        name: getattr(request, name) for name in ("max_running", "max_waiting") if getattr(request, name) is not None
    }
    return ModelSpec(
        request.key or schemas.derive_key(request.model),
        request.model,
        type=request.type,
        adapter=request.adapter,
        context_length=request.context_length,
        cache_tokens=request.cache_tokens,
        shard=request.shard,
        pin=request.pin,
        ttl=request.ttl,
        defaults=request.defaults,
        **said,
    )
