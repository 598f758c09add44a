"""JSON schemas of responses, their items and their events, by name."""

from __future__ import annotations

from mlxserver.api.schema.response_shapes import (
    BOOLEAN,
    COUNT,
    NUMBER,
    TEXT,
    Schema,
    by_key,
    each,
    exactly,
    maybe,
    named,
    one_of,
)

ANY: Schema = {"type": "object"}
ITEM_STATUS = one_of("in_progress", "completed", "incomplete")
ITEM = {"id": TEXT, "status": ITEM_STATUS}
INPUT_TEXT = exactly(type=one_of("input_text"), text=TEXT)
INPUT_PARTS = each({"anyOf": [INPUT_TEXT, exactly(type=one_of("input_image"), image_url=TEXT, detail=TEXT)]})
OUTPUT_TEXT = exactly(
    type=one_of("output_text"), text=TEXT, annotations=each(ANY), logprobs=each(named("TokenLogprob"))
)
REFUSAL = exactly(type=one_of("refusal"), refusal=TEXT)
SUMMARY = exactly(type=one_of("summary_text"), text=TEXT)
CALL = {"call_id": TEXT, "name": TEXT, "namespace_": TEXT}
PLACE = {"item_id": TEXT, "output_index": COUNT}


def _event(kind: str, **fields: Schema) -> Schema:
    return exactly(type=one_of(f"response.{kind}"), sequence_number=COUNT, **fields)


def _part_events() -> list[Schema]:
    """Events of what items have in them."""
    text, summary = {**PLACE, "content_index": COUNT}, {**PLACE, "summary_index": COUNT}
    logprobs = each(named("TokenLogprob"))
    return [
        *[_event(f"content_part.{step}", **text, part=OUTPUT_TEXT) for step in ("added", "done")],
        _event("output_text.delta", **text, delta=TEXT, logprobs=logprobs),
        _event("output_text.done", **text, text=TEXT, logprobs=logprobs),
        *[_event(f"reasoning_summary_part.{step}", **summary, part=SUMMARY) for step in ("added", "done")],
        _event("reasoning_summary_text.delta", **summary, delta=TEXT),
        _event("reasoning_summary_text.done", **summary, text=TEXT),
        _event("function_call_arguments.delta", **PLACE, delta=TEXT),
        _event("function_call_arguments.done", **PLACE, name=TEXT, arguments=TEXT),
        _event("custom_tool_call_input.delta", **PLACE, delta=TEXT),
        _event("custom_tool_call_input.done", **PLACE, input=TEXT),
    ]


RESPONSES_SCHEMAS: dict[str, Schema] = {
    "Response": exactly(
        id=TEXT,
        object=one_of("response"),
        created_at=COUNT,
        completed_at=maybe(COUNT),
        status=one_of("in_progress", "completed", "incomplete", "failed"),
        error=maybe(exactly(code=TEXT, message=TEXT)),
        incomplete_details=maybe(exactly(reason=one_of("max_output_tokens"))),
        background=BOOLEAN,
        instructions=maybe(TEXT),
        max_output_tokens=maybe(COUNT),
        metadata=by_key(TEXT),
        model=TEXT,
        output=each(named("OutputItem")),
        parallel_tool_calls=BOOLEAN,
        previous_response_id=maybe(TEXT),
        prompt_cache_key=maybe(TEXT),
        reasoning=exactly(effort=maybe(TEXT), summary=maybe(TEXT)),
        safety_identifier=maybe(TEXT),
        service_tier=one_of("default"),
        store=BOOLEAN,
        temperature=maybe(NUMBER),
        text=exactly(format=ANY, verbosity_=TEXT),
        tool_choice={"anyOf": [TEXT, ANY]},
        tools=each(ANY),
        top_logprobs=COUNT,
        top_p=maybe(NUMBER),
        truncation=one_of("auto", "disabled"),
        usage=maybe(named("ResponseUsage")),
        user=maybe(TEXT),
    ),
    "ResponseUsage": exactly(
        input_tokens=COUNT,
        input_tokens_details=exactly(cached_tokens=COUNT, cache_write_tokens=COUNT),
        output_tokens=COUNT,
        output_tokens_details=exactly(reasoning_tokens=COUNT),
        total_tokens=COUNT,
    ),
    "OutputItem": {
        "anyOf": [
            exactly(
                type=one_of("message"),
                role=one_of("assistant"),
                content=each({"anyOf": [OUTPUT_TEXT, REFUSAL]}),
                **ITEM,
            ),
            exactly(
                type=one_of("reasoning"),
                summary=each(SUMMARY),
                content_=each(exactly(type=one_of("reasoning_text"), text=TEXT)),
                **ITEM,
            ),
            exactly(type=one_of("function_call"), arguments=TEXT, **CALL, **ITEM),
            exactly(type=one_of("custom_tool_call"), input=TEXT, **CALL, **ITEM),
        ]
    },
    "InputItem": {
        "anyOf": [
            exactly(
                type=one_of("message"),
                role=one_of("user", "system", "developer"),
                content=INPUT_PARTS,
                **ITEM,
            ),
            exactly(
                type=one_of("function_call_output", "custom_tool_call_output"),
                call_id=TEXT,
                output={"anyOf": [TEXT, INPUT_PARTS]},
                **ITEM,
            ),
            named("OutputItem"),
        ]
    },
    "ItemList": exactly(
        object=one_of("list"), data=each(named("InputItem")), first_id=TEXT, last_id=TEXT, has_more=BOOLEAN
    ),
    "DeletedResponse": exactly(id=TEXT, object=one_of("response"), deleted=BOOLEAN),
    "ResponseEvent": {
        "anyOf": [
            *[
                _event(name, response=named("Response"))
                for name in ("created", "in_progress", "completed", "incomplete", "failed")
            ],
            *[
                _event(f"output_item.{step}", output_index=COUNT, item=named("OutputItem"))
                for step in ("added", "done")
            ],
            *_part_events(),
        ]
    },
}
