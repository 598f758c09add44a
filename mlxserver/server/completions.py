"""Answers of /v1/completions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mlxserver.api import responses, schemas
from mlxserver.api.openai.chunks import TextChunkEncoder
from mlxserver.engine.events import Delta, Event, Finish
from mlxserver.server import translation
from mlxserver.server.forms import Form, finish_reason, new_head, text_of


class TextForm(Form):
    """A bare completion. echoes: the texts of the prompts, where answers begin with them."""

    def __init__(self, request: schemas.CompletionRequest, echoes: Sequence[str] = ()) -> None:
        self._echoes = {prompt * request.n + n: text for prompt, text in enumerate(echoes) for n in range(request.n)}
        self._has_logprobs = request.logprobs is not None
        self._offsets: defaultdict[int, int] = defaultdict(int)
        head = new_head(request, responses.completion_id("cmpl"), "text_completion", int(time.time()))
        self._text = TextChunkEncoder(head)
        super().__init__(request, head, self._text, is_inline=True)

    def _opening(self) -> bytes:
        return b"".join(self._text.text(text, choice) for choice, text in self._echoes.items())

    def _piece(self, event: Event, choice: int) -> bytes:
        match event:
            case Delta(text) if not self._has_logprobs:
                return self._text.text(text, choice)
            case Delta(text, logprobs=tokens):
                told = translation.text_logprobs(tokens, self._offsets[choice])
                self._offsets[choice] += len(text)
                return self._text.text(text, choice, told)
            case Finish(reason):
                return self._text.finish(reason, choice)
        return b""

    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]:
        tokens = [token for event in events if isinstance(event, Delta) for token in event.logprobs]
        return responses.text_choice(
            self._echoes.get(index, "") + text_of(events),
            finish_reason(events),
            index=index,
            logprobs=translation.text_logprobs(tokens, 0) if self._has_logprobs else None,
        )
