"""POST /tokenize and /detokenize: the requests and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.api.openai.chat import PromptRequest
from mlxserver.api.openai.completions import TOKENS, check_tokens
from mlxserver.api.openai.generation import ModelRequest
from mlxserver.api.openai.messages import SHAPE as MESSAGES
from mlxserver.api.openai.messages import check_messages
from mlxserver.api.schema.parameters import Parameter, ValidationFailed
from mlxserver.engine.conversation import Message
from mlxserver.engine.requests import TextPrompt, Tokenize


class TokenizeRequest(PromptRequest):
    """POST /tokenize."""

    prompt: str | None = Parameter(str, "Text; special tokens in it count. Either this or messages.")
    messages: tuple[Message, ...] | None = Parameter(
        object, "A conversation, set in the model's chat template.", check=check_messages, shape=MESSAGES
    )

    @property
    def question(self) -> Tokenize:
        """The question to the model's tokenizer."""
        return Tokenize(TextPrompt(self.prompt or "") if self.messages is None else self.chat_prompt(self.messages))

    def check_together(self) -> None:
        """Refuse both of prompt and messages, and neither."""
        super().check_together()
        if (self.prompt is None) == (self.messages is None):
            raise ValidationFailed("Expected one of 'prompt' and 'messages'.", "prompt")
        self.check_prefill(self.messages)


class DetokenizeRequest(ModelRequest):
    """POST /detokenize."""

    tokens: tuple[int, ...] = Parameter(object, "Token ids.", required=True, check=check_tokens, shape=TOKENS)


def tokenized(tokens: Sequence[int], context_length: int | None) -> dict[str, Any]:
    """Answer to a tokenize. context_length: in tokens, None while not known."""
    return {"count": len(tokens), "tokens": list(tokens), "max_model_len": context_length}


def detokenized(text: str) -> dict[str, Any]:
    """Answer to a detokenize."""
    return {"prompt": text}
