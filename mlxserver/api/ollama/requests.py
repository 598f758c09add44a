"""Bodies of chat and generate, and the engine requests that they become.

Rule: what Ollama's API has and this server has not is refused by name; an empty value of it asks for nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mlxserver.api.ollama.messages import IMAGES, check_images, check_messages
from mlxserver.api.ollama.messages import SHAPE as MESSAGES
from mlxserver.api.ollama.options import OPTIONS, Options, check_options
from mlxserver.api.openai.chat import MAX_TOP_LOGPROBS
from mlxserver.api.openai.generation import ModelRequest, keep_alive_parameter
from mlxserver.api.openai.thinking import THINK, Thinking, check_think
from mlxserver.api.openai.tools import TOOLS, check_tools
from mlxserver.api.schema.parameters import Check, Parameter, ValidationFailed, invalid
from mlxserver.engine.conversation import Image, Message, Text, Tool
from mlxserver.engine.requests import ChatPrompt, FillPrompt, GenerationRequest, JsonFormat, Prompt, TextPrompt

FORMAT: dict[str, Any] = {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]}


def check_format(value: Any, param: str) -> JsonFormat | None:
    """The form of the answer: "json", a JSON schema, or "" for text. Raises ValidationFailed."""
    if value == "":
        return None
    if value != "json" and not isinstance(value, dict):
        raise invalid(param, value, "'json' or a JSON schema")
    return JsonFormat(value if isinstance(value, dict) else None, param)


def refused(why: str) -> Check:
    """A check that refuses any value but an empty one, and states why."""

    def check(value: Any, param: str) -> None:
        if value not in ("", [], {}):
            raise ValidationFailed(f"'{param}' is not supported. {why}", param)

    return check


def _refused_field(why: str) -> Any:
    return Parameter(object, f"Refused unless it is empty. {why}", check=refused(why), shape={"enum": ["", []]})


class AnsweringRequest(ModelRequest):
    """What chat and generate share."""

    __not_applied__: ClassVar = {"truncate": (False,), "shift": (False,)}

    options: Options | None = Parameter(
        object, "Sampling, stops and the token limit.", check=check_options, shape=OPTIONS
    )
    format: JsonFormat | None = Parameter(
        object, "The form of the answer: 'json', or a JSON schema, which is enforced.", check=check_format, shape=FORMAT
    )
    think: Thinking | None = Parameter(
        object, "false turns thinking off; low, medium and high are efforts.", check=check_think, shape=THINK
    )
    stream: bool = Parameter(bool, "Send the answer as it is made, in lines of JSON.", default=True)
    keep_alive: float | None = keep_alive_parameter()
    logprobs: bool = Parameter(bool, "State each token with its log-probability.", default=False)
    top_logprobs: int | None = Parameter(
        int, "How many of the likeliest tokens to state at each position.", ge=0, le=MAX_TOP_LOGPROBS
    )

    @property
    def prompt_or_none(self) -> Prompt | None:
        """What is to be answered; None loads or unloads the model."""
        raise NotImplementedError

    @property
    def generation_requests(self) -> list[GenerationRequest]:
        """The engine request; none where there is nothing to answer."""
        if (prompt := self.prompt_or_none) is None:
            return []
        options = self.options or Options()
        return [
            GenerationRequest(
                prompt,
                options.sampling,
                options.num_predict,
                options.stop,
                top_logprobs=self.top_logprobs or 0 if self.logprobs else None,
                format=self.format,
            )
        ]

    @property
    def all_ignored(self) -> tuple[str, ...]:
        """Names of parameters that were given and ignored, those in the options included."""
        options = self.options.ignored if self.options else ()
        return (*self.ignored, *(f"options.{name}" for name in options))

    @property
    def _template_kwargs(self) -> dict[str, Any]:
        return self.think.template_kwargs if self.think else {}


class OllamaChatRequest(AnsweringRequest):
    """POST /api/chat."""

    messages: tuple[Message, ...] = Parameter(
        object, "The conversation so far; without any the model is loaded.", default=(), check=check_messages,
        shape=MESSAGES,
    )  # fmt: skip
    tools: tuple[Tool, ...] = Parameter(
        object, "Functions that the model may call.", default=(), check=check_tools, shape=TOOLS
    )

    @property
    def prompt_or_none(self) -> Prompt | None:
        """What is to be answered; None loads or unloads the model."""
        return ChatPrompt(self.messages, self.tools, self._template_kwargs) if self.messages else None


class OllamaGenerateRequest(AnsweringRequest):
    """POST /api/generate."""

    __unsupported__: ClassVar = dict.fromkeys(("width", "height", "steps"), "Text is all that these models make.")

    prompt: str = Parameter(str, "What to answer; without it the model is loaded.", default="")
    system: str = Parameter(str, "System message before the prompt.", default="")
    suffix: str = Parameter(
        str, "What follows the text that is to be generated, for models that can fill in the middle.", default=""
    )
    raw: bool = Parameter(bool, "Go on from the prompt as it is, without the chat template.", default=False)
    images: tuple[Image, ...] = Parameter(
        object, "Images in base64, shown before the prompt.", default=(), check=check_images, shape=IMAGES
    )
    template: None = _refused_field("The chat template is the model's; send a finished prompt with 'raw'.")
    context: None = _refused_field("Send the conversation to /api/chat.")

    @property
    def prompt_or_none(self) -> Prompt | None:
        """What is to be answered; None loads or unloads the model."""
        if self.suffix:
            return FillPrompt(self.prompt, self.suffix)
        if not self.prompt and not self.images:
            return None
        if self.raw:
            return TextPrompt(self.prompt)
        system = (Message("system", (Text(self.system),), "system"),) if self.system else ()
        text = (Text(self.prompt),) if self.prompt else ()
        user = Message("user", (*self.images, *text), "prompt")
        return ChatPrompt((*system, user), template_kwargs=self._template_kwargs)

    def check_together(self) -> None:
        """Refuse images that have no place: they are shown by the chat template."""
        super().check_together()
        if self.images and (self.raw or self.suffix):
            other = "raw" if self.raw else "suffix"
            raise ValidationFailed(f"'images' need the chat template, which '{other}' leaves out.", "images")
