"""JSON schemas of Ollama's answers, by name."""

from __future__ import annotations

from mlxserver.api.schema.response_shapes import BOOLEAN, COUNT, NUMBER, TEXT, Schema, each, exactly, named, one_of

CALL = exactly(id=TEXT, function=exactly(index=COUNT, name=TEXT, arguments={"type": "object"}))
ENDING = {
    "done_reason_": one_of("stop", "length", "load", "unload"),
    "total_duration_": COUNT,
    "load_duration_": COUNT,
    "prompt_eval_count_": COUNT,
    "prompt_eval_duration_": COUNT,
    "eval_count_": COUNT,
    "eval_duration_": COUNT,
}
HEAD = {"model": TEXT, "created_at": TEXT, "done": BOOLEAN, "logprobs_": each(named("TokenLogprob"))}
DETAILS = exactly(
    parent_model=TEXT,
    format=TEXT,
    family=TEXT,
    families=each(TEXT),
    parameter_size=TEXT,
    quantization_level=TEXT,
)
MODEL = {"name": TEXT, "model": TEXT, "digest": TEXT, "size": COUNT, "details": DETAILS}

OLLAMA_SCHEMAS: dict[str, Schema] = {
    "OllamaError": exactly(error=TEXT),
    "OllamaChat": exactly(
        message=exactly(role=one_of("assistant"), content=TEXT, thinking_=TEXT, tool_calls_=each(CALL)),
        **HEAD,
        **ENDING,
    ),
    "OllamaGenerate": exactly(response=TEXT, thinking_=TEXT, **HEAD, **ENDING),
    "OllamaTags": exactly(models=each(exactly(modified_at=TEXT, **MODEL))),
    "OllamaRunning": exactly(models=each(exactly(size_vram=COUNT, expires_at=TEXT, context_length=COUNT, **MODEL))),
    "OllamaShown": exactly(
        modelfile=TEXT,
        parameters=TEXT,
        template=TEXT,
        details=DETAILS,
        model_info={"type": "object"},
        capabilities=each(TEXT),
        modified_at=TEXT,
    ),
    "OllamaVersion": exactly(version=TEXT),
    "OllamaProgress": exactly(status=TEXT, digest_=TEXT, total_=COUNT, completed_=COUNT),
    "OllamaEmbed": exactly(
        model=TEXT,
        embeddings=each(each(NUMBER)),
        total_duration_=COUNT,
        load_duration_=COUNT,
        prompt_eval_count_=COUNT,
    ),
    "OllamaEmbedding": exactly(embedding=each(NUMBER)),
}
