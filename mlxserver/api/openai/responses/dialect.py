"""Dialect of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlxserver.api.dialect import Call
from mlxserver.api.openai.responses.encoder import ResponseEncoder
from mlxserver.api.openai.responses.items import Item, LeftOut, Reference, check_input, conversation
from mlxserver.api.openai.responses.request import ResponseRequest
from mlxserver.api.openai.responses.response_object import ResponseObject
from mlxserver.api.openai.responses.store import ResponseNotFound, ResponseStore
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import ValidationFailed, abbreviate, invalid, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.requests import ChatPrompt, GenerationRequest


class ResponsesDialect:
    """Dialect of responses, and the store that they are kept in."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)
        self.store = ResponseStore(settings.response_store, settings.response_store_bytes)

    def parse(self, body: bytes) -> Call:
        """Read a request for a response. Raises ValidationFailed."""
        request = parse(ResponseRequest, body, self._limits)
        items = [item for item in request.input if isinstance(item, Item)]
        encoder = ResponseEncoder(ResponseObject(request, is_stored=False), request.tools)
        unknown = [item.origin for item in request.input if isinstance(item, LeftOut) and not item.is_known]
        return Call(
            request.model,
            [_generation_request(request, items)],
            encoder,
            streams=request.stream,
            idle_timeout=request.keep_alive,
            ignored=(*request.ignored, *request.tools.unknown, *unknown),
            for_client=partial(self._for_client, request),
        )

    def _for_client(self, request: ResponseRequest, call: Call, client: str) -> Call:
        """The call with what the store has for it, and will have of it. Raises ValidationFailed."""
        items = [*self._previous(request, client), *self._resolved(request, client)]
        wires = [item.wire for item in items]
        if request.previous_response_id or any(isinstance(item, Reference) for item in request.input):
            self._limits.check({"input": wires}, self._limits.prompt_bytes + 1)
        is_stored = request.store and self.store.is_on
        encoder = ResponseEncoder(ResponseObject(request, is_stored=is_stored), request.tools)
        if is_stored:
            encoder.keep = lambda response: self.store.put(client, response, wires)
        return replace(call, requests=[_generation_request(request, items)], encoder=encoder)

    def _previous(self, request: ResponseRequest, client: str) -> Iterator[Item]:
        """The items of the conversation that is continued."""
        if request.previous_response_id is None:
            return
        param = "previous_response_id"
        try:
            stored = self.store.get(client, request.previous_response_id)
        except ResponseNotFound:
            message = f"Previous response with id {abbreviate(request.previous_response_id)} not found."
            raise ValidationFailed(message, param, code="previous_response_not_found") from None
        yield from _read([*stored.input_items, *stored.output_items], param)

    def _resolved(self, request: ResponseRequest, client: str) -> Iterator[Item]:
        """The items of the input, references by what they refer to, which each may name once."""
        named: set[str] = set()
        for item in request.input:
            if isinstance(item, Item):
                yield item
            elif isinstance(item, Reference):
                if item.id in named:
                    raise invalid(f"{item.origin}.id", item.id, "an id that no other reference has")
                named.add(item.id)
                found = self.store.item(client, item.id)
                if found is None:
                    raise ValidationFailed(f"Item with id {abbreviate(item.id)} not found.", f"{item.origin}.id")
                yield from _read([found], item.origin)


def _read(wires: Sequence[dict[str, Any]], param: str) -> Iterator[Item]:
    return (item for item in check_input(wires, param) if isinstance(item, Item))


def _generation_request(request: ResponseRequest, items: Sequence[Item]) -> GenerationRequest:
    tools, choice = request.tools.tools, request.tool_choice
    return GenerationRequest(
        ChatPrompt(
            conversation(request.instructions, items),
            choice.among(tools),
            request.template_kwargs,
            drops_oldest=request.truncation == "auto",
        ),
        request.sampling,
        request.token_limit,
        top_logprobs=request.num_logprobs,
        format=request.text.format,
        tool_choice=choice.resolved(parallel=request.parallel_tool_calls),
        thinking_budget=request.switches.budget,
    )
