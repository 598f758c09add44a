"""Settings of the server and of its models: frozen, built once from file, environment and flags (config/load.py).

Invariant: a setting is one line here or in config/http.py. Its annotation says what it accepts, makes its TOML key,
environment variable and flag, and has its marks (config/fields.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from mlxserver.config.fields import Identity, Internal, Live, Range, Setting, Shared, Size, settings_of
from mlxserver.config.http import FILES, HttpSettings

ModelType = Literal["thinking", "instruction"]
Kind = Literal["text", "vision", "embedding", "rerank"]
Shard = Literal["tensor", "pipeline"]
Weights = Literal["auto", "stored", "bfloat16", "float32"]
Speculation = Literal["auto", "off", "always"]
KVBits = Literal[4, 8]
KVGroupSize = Literal[32, 64, 128]
LogFormat = Literal["text", "json"]
UnclosedThinking = Literal["reasoning", "content"]
ReasoningFormat = Literal["reasoning_content", "reasoning", "inline"]
UnknownParameters = Literal["refuse", "ignore"]
LogLevel = Literal["critical", "error", "warning", "info", "debug"]

KV_GROUP_SIZES: tuple[int, ...] = get_args(KVGroupSize)


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """What a model's section `policy` may fix; what is left out is as the device has it, or was measured.

    The fields are those of ExecutionPolicy (engine/platform/policy.py).
    """

    compile_steps: Annotated[bool, "decode steps and chunks are compiled graphs; needs pad_slots"]
    pad_slots: Annotated[bool, "decode steps compute unused slots and capacity, so that shapes recur"]
    bucket_prefill: Annotated[bool, "prompts are padded to chunks of few lengths"]
    fuse_projections: Annotated[bool, "projections of one input are one product"]
    fuse_layers: Annotated[bool, "decode steps compute a layer in few operations; CUDA"]
    decode_kernel: Annotated[bool, "attention of a decode step is one kernel for sequences of all lengths; CUDA"]


POLICY_FIELDS: Mapping[str, Setting] = settings_of(FixedPolicy)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One registered model.

    key: the name in requests. source: Hugging Face id, MLX directory, .gguf file or embedded:NAME (loading/sources.py).
    kind: what the model makes of a text; None finds it from the checkpoint's files (loading/kinds.py). type: of a text
    model, None infers it from template and tokenizer. adapter: directory of a LoRA adapter. preload: load at the start.
    context_length: tokens, None takes the model's own. min_context: tokens of one request whose KV cache is reserved
    with the model. max_running, max_waiting: requests decoding together, and waiting for a slot. prefix_cache_bytes:
    what the prefix cache may keep in memory. checkpoint_interval: tokens between the checkpoints of a long prompt,
    where the KV cache can't be trimmed. cache_tokens: most tokens in the KV cache of all requests together, None for no
    cap. aliases: more names in requests, or patterns of names. pin: never evicted. ttl: idle seconds until it is
    unloaded, None takes the server's. defaults: sampling parameters by name (config/sampling_params.py). shard: how
    several ranks share it (loading/sharding.py), None: rank 0 has it alone. unclosed_thinking: what an answer is that
    the model ended inside its reasoning; "content" gives it as both. weights: how quantized weights are held: as
    stored, or dequantized to 16 bits or float32; "auto" takes what is fastest on the device and leaves room for
    others. kv_bits: bits per value of the KV cache, None keeps keys and values as they are computed; kv_group_size:
    values that share a scale then. speculation: tokens are drafted from the prompt and the answer so far, and
    verified together: "auto" where that is measured to be faster, or wherever some are predicted. draft: key of a
    smaller model of the same vocabulary that drafts them, too; drafter: its own spec, which the manager finds at a
    load. mtp: without a draft, a head of its own that predicts more tokens (loading/mtp.py) drafts them, too. policy:
    what is fixed of the device's policy, by name (POLICY_FIELDS). is_widened: its `weights` were "auto", and a load has
    made 16 bits of them.
    """

    key: Annotated[str, Shared()]
    source: Annotated[str, Shared(), Identity()]
    type: Annotated[ModelType | None, Identity()] = None
    adapter: Annotated[str | None, Shared(), Identity()] = None
    preload: Annotated[bool, Live()] = False
    context_length: Annotated[int | None, Range(1), Shared(), Identity()] = None
    max_running: Annotated[int, Range(1), Shared()] = 32
    max_waiting: Annotated[int, Range(0), Live()] = 256
    prefix_cache_bytes: Annotated[int, Range(0), Size(), Shared()] = 1 << 30
    checkpoint_interval: Annotated[int, Range(16), Shared()] = 4096
    cache_tokens: Annotated[int | None, Range(16), Shared()] = None
    aliases: Annotated[tuple[str, ...], Live()] = ()
    pin: Annotated[bool, Live()] = False
    ttl: Annotated[float | None, Range(0), Live()] = None
    defaults: Mapping[str, float] = field(default_factory=dict)
    shard: Annotated[Shard | None, Shared(), Identity()] = None
    unclosed_thinking: UnclosedThinking = "reasoning"
    kind: Annotated[Kind | None, Identity()] = None
    min_context: Annotated[int, Range(16), Shared()] = 4096
    weights: Annotated[Weights, Shared(), Identity()] = "auto"
    kv_bits: Annotated[KVBits | None, Shared(), Identity()] = None
    kv_group_size: Annotated[KVGroupSize, Shared(), Identity()] = 64
    speculation: Speculation = "auto"
    draft: str | None = None
    drafter: Annotated[ModelSpec | None, Internal()] = None
    mtp: bool = True
    policy: Mapping[str, bool] = field(default_factory=dict)
    is_widened: Annotated[bool, Internal()] = False


@dataclass(frozen=True, slots=True)
class Settings(HttpSettings):
    """All settings of the server. Times are in seconds, sizes in bytes."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, Range(0, 65535), "port to listen on; 0 takes a free one"] = 8000
    log_level: Annotated[LogLevel, Live(), "what to log"] = "info"
    models: Annotated[tuple[ModelSpec, ...], Live()] = ()
    stall_target: Annotated[float, Range(0.001, 60), "seconds that a prefill may hold running streams up"] = 0.25
    shutdown_timeout: Annotated[
        float, Range(0, 86_400), Live(), "seconds that running requests get to finish at the end"
    ] = 30.0
    memory_limit: Annotated[
        int, Range(0), Size(), Live(), "memory that all models may take; 0: a share of the device's"
    ] = 0
    min_residency: Annotated[
        float, Range(0), Live(), "seconds that a model in use stays loaded although requests wait for another one"
    ] = 10.0
    max_wait: Annotated[
        float, Range(0), Live(), "seconds after which a request gets its model loaded, min_residency or not"
    ] = 30.0
    ttl: Annotated[float, Range(0), Live(), "idle seconds until a model is unloaded; inf: never"] = math.inf
    wedged_after: Annotated[
        float, Range(1), Live(), "seconds without a step after which a busy engine counts as stalled"
    ] = 120.0
    prefix_cache_dir: Annotated[str, "where prefixes are kept on disk; auto: in the user's cache directory"] = "auto"
    prefix_cache_disk_bytes: Annotated[
        int, Range(0), Size(), "what the prefixes of all models may take on disk; 0: none are written"
    ] = 10 << 30
    default_max_tokens: Annotated[
        int, Range(0), Live(), "most tokens of an answer whose request states no limit; 0: up to the end of the context"
    ] = 4096
    load_on_demand: Annotated[bool, Live(), "load a registered model at its first request"] = True
    allow_any_model: Annotated[bool, Live(), "let a request load any Hugging Face id"] = False
    library: Annotated[bool, Live(), "offer the models that other programs keep on this machine"] = True
    model_dirs: Annotated[
        tuple[str, ...], FILES, Live(), "folder with models to offer, searched before the others"
    ] = ()
    log_format: Annotated[LogFormat, "a line for people, or a JSON object, per event"] = "text"
    unknown_parameters: Annotated[UnknownParameters, "what to do with request parameters that do not exist"] = "refuse"
    reasoning_format: Annotated[ReasoningFormat, "where reasoning goes in answers"] = "reasoning_content"
    measure_policies: Annotated[bool, "measure in idle moments how a model runs fastest on this machine"] = True
    page: Annotated[bool, Live(), "serve the page for browsers at /"] = True
    log_contents: Annotated[bool, Live(), "keep prompts and answers of the last requests, for admins"] = False
    response_store: Annotated[int, Range(0), "responses of /v1/responses that are kept in memory; 0: none"] = 1000
    response_store_bytes: Annotated[int, Range(0), Size(), "what they may take, as JSON"] = 64 << 20
    rank_timeout: Annotated[float, Range(1, 3600), Shared(), "seconds of silence until another rank counts as lost"] = (
        20.0
    )
