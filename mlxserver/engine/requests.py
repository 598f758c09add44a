"""Engine requests. Plain frozen data, safe to share between threads; knows neither MLX nor HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mlxserver.config.settings import Kind
from mlxserver.engine.conversation import Image, Message, Tool

NO_LIMIT = 2**63 - 1  # as max_tokens: an answer may fill the context, however long


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Conversation to be set in the model's chat template.

    template_kwargs: variables of the template. continues_answer: the last message is the assistant's, and the answer
    goes on from its text. drops_oldest: messages are left out so that it fits in the context.
    """

    conversation: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continues_answer: bool = False
    drops_oldest: bool = False

    @property
    def images(self) -> list[Image]:
        """The images of the conversation, in order."""
        return [image for message in self.conversation for image in message.images]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to go on from as it is, without a chat template; special tokens in it count."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to go on from."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FillPrompt:
    """Text before a gap that is to be filled in, and text behind it."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Request for one vector per text to an embedding model.

    dimensions: leading values of each vector to keep, None for all. truncates: a text that is too long is cut.
    prompt_name: the checkpoint's prompt that is put before each text; requires_prompt: it has to have one of that name.
    origin: where the client wrote the texts. tokens: of each text, once they are known.
    """

    texts: tuple[TextPrompt | TokenPrompt, ...]
    dimensions: int | None = None
    truncates: bool = False
    prompt_name: str | None = None
    requires_prompt: bool = False
    origin: str = "input"
    tokens: tuple[tuple[int, ...], ...] = ()
    kinds: ClassVar[tuple[Kind, ...]] = ("embedding",)

    @property
    def n(self) -> int:
        """Number of its choices: one per text."""
        return len(self.texts)

    def place(self, index: int) -> str:
        """Where the client wrote a text; one alone may be no item of a list."""
        return f"{self.origin}[{index}]" if len(self.texts) > 1 else self.origin


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Request for the relevance of each document to a query, to a reranker.

    instruction: what makes a document relevant, None for the reranker's own. truncates: a document is cut where it is
    too long beside the query. max_document_tokens: documents are cut to so many tokens. pairs: the query with each
    document, once their tokens are known; second_texts: Sequence.second_text of each.
    """

    query: str
    documents: tuple[str, ...]
    instruction: str | None = None
    truncates: bool = False
    max_document_tokens: int | None = None
    pairs: tuple[tuple[int, ...], ...] = ()
    second_texts: tuple[int, ...] = ()
    kinds: ClassVar[tuple[Kind, ...]] = ("rerank",)

    @property
    def n(self) -> int:
        """Number of its choices: one per document."""
        return len(self.documents)


Prompt = ChatPrompt | TextPrompt | TokenPrompt | FillPrompt


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """Answer in JSON.

    schema: a JSON schema; None allows any object. origin: where the client wrote it, as its dialect names it.
    """

    schema: Mapping[str, Any] | None = None
    origin: str = "format.schema"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Choice among the prompt's tools. "function" forces the one of that name; parallel: several calls are allowed."""

    mode: Literal["none", "auto", "required", "function"] = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """An image as a model's processor makes it.

    key: names its content in the prefix cache, below 0. text: what stands for it in the prompt. tokens: number of its
    tokens there. inputs: arrays for the tower by the names that mlx-vlm has for them. grid: rows and columns of its
    tokens, where they have such positions.
    """

    key: int
    text: str
    tokens: int
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image in a prompt. positions: of its tokens among the prompt's, in order."""

    image: ProcessedImage
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """Prompt as the model reads it. opens_thinking: it ends inside the reasoning, of which only the end will come.

    boundaries: numbers of its first tokens that another prompt of the conversation is likely to have in common with it.
    ends: tokens that end its answer beside those that end any. images: those in it.
    """

    tokens: tuple[int, ...]
    text: str
    opens_thinking: bool = False
    boundaries: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Grammar:
    """Grammar of answers in llguidance's Lark, or JSON Schema as llguidance takes it.

    param: the request's field that it comes from. documents: the schemas that it was made from, to find faults in.
    """

    text: str
    param: str
    is_lark: bool = False
    documents: tuple[Any, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to one model.

    sampling: the parameters that the request states, by their names in SamplingParams; the model's defaults fill in.
    max_tokens None means that no limit is stated: up to the end of the context, as NO_LIMIT does where one is wanted;
    0: an answer without a token. n answers are made from one prompt. top_logprobs None asks for no log-probabilities, 0
    for the chosen token's alone; prompt_logprobs: likewise, of the prompt. thinking_budget: most tokens of reasoning
    before it is closed. formatted: the prompt as the model reads it, once it is known; grammar: that of the answers,
    known with it.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    format: JsonFormat | None = None
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    thinking_budget: int | None = None
    formatted: FormattedPrompt | None = None
    grammar: Grammar | None = None
    kinds: ClassVar[tuple[Kind, ...]] = ("text", "vision")


EngineRequest = GenerationRequest | EmbeddingRequest | RerankRequest


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Question for the token ids of a prompt: answered with a tuple of ints."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Question for the text of token ids: answered with a string."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ApplyTemplate:
    """Question for the text that the chat template makes of a conversation: answered with a string."""

    prompt: ChatPrompt


Question = Tokenize | Detokenize | ApplyTemplate


@dataclass(frozen=True, slots=True)
class Execution:
    """Paths that serve a model. cache: of its decode batch ("single": a forward pass per sequence and step).

    speculation: whether drafted tokens may be verified. draft: key of the model that drafts some.
    """

    cache: Literal["slots", "merged", "single"]
    padded_prefill: bool
    compiled: bool
    speculation: bool = False
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What a model's policy has (engine/platform/policy.py). weights: "stored", "quantized", "bfloat16" or
    "float32".

    fixed, measured: names of fields that are as a setting has them, or as a measurement has found them to be faster.
    """

    compile_steps: bool
    pad_slots: bool
    bucket_prefill: bool
    fuse_projections: bool
    fuse_layers: bool
    decode_kernel: bool
    weights: str
    fixed: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a loaded model: context in tokens, weights in bytes as they are held.

    reserved_kv_bytes: KV cache that is reserved with the model; None where the estimate knows it.
    capabilities: of "chat", "completion", "tools", "json_schema", "logprobs", "thinking", "fill_in_middle",
    "vision", "embeddings" and "rerank". execution, policy: None where ranks share the model, and of an encoder. type:
    None of one, too.
    """

    type: str | None
    context_length: int
    weight_bytes: int
    capabilities: frozenset[str] = frozenset()
    execution: Execution | None = None
    reserved_kv_bytes: int | None = None
    kind: Kind = "text"
    policy: PolicyFacts | None = None
