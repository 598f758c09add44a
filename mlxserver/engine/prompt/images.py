"""Images of prompts, as the processor of a model makes them: what stands for each in the text, and its pixels.

Runs on the tokenizer worker. Each image is processed by itself, whatever stands around it, and once as long as it is
kept: a conversation brings its images again with every turn.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image as pillow

from mlxserver.engine.conversation import Image, Message, Part, Text, ToolResult
from mlxserver.engine.errors import PromptRejected, one_line
from mlxserver.engine.images import decode
from mlxserver.engine.requests import ChatPrompt, PlacedImage, ProcessedImage

RESULT_IMAGES = "The images of this result:"
_PROBE = (64, 64)  # pixels
_NOT_FOR_TOWERS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class ImageProcessor:
    """Processes images with a model's own processor, which mlx-vlm or transformers read. token: id of its image token.

    kept_bytes: of what was processed last. most_pixels: of a picture, which is scaled down to them; None for any.
    versions: of all that makes features of an image, which outlive the process; by default the present ones.
    placeholder: text that stands for an image in what the chat template writes.

    Raises whatever the processor does for a picture that it can't process.
    """

    def __init__(
        self, processor: Any, token: int, kept_bytes: int, most_pixels: int | None = None, versions: str = ""
    ) -> None:
        self._processor = processor
        self._token = token
        self._tokenizer = processor.tokenizer = _Recorder(processor.tokenizer)
        self._merge = int(getattr(getattr(processor, "image_processor", None), "merge_size", 0) or 0)
        self._most = kept_bytes
        self._most_pixels = most_pixels
        self._kept: OrderedDict[int, ProcessedImage] = OrderedDict()
        self._held = 0
        self._keys: dict[tuple[int, bool], tuple[bytes, int]] = {}  # of one prompt's, by file and whether detail is low
        self._versions = versions or _versions()
        self.placeholder = self._find_placeholder()

    def probe(self) -> ProcessedImage:
        """A small grey picture as the processor makes it."""
        return self.process_picture(pillow.new("RGB", _PROBE, "grey"))

    def _find_placeholder(self) -> str:
        """The text that the processor puts an image in place of."""
        refusal: Exception | None = None
        named = [getattr(self._processor, name, None) for name in ("image_token", "boi_token")]
        for placeholder in (*named, self._tokenizer.convert_ids_to_tokens(self._token)):
            if isinstance(placeholder, str):
                self.placeholder = placeholder
                try:
                    if self.probe().tokens:
                        return placeholder
                except Exception as error:  # foreign code
                    refusal = refusal or error
        raise refusal or ValueError("its processor has no text that stands for an image")

    def begin(self) -> None:
        """Begin with another prompt."""
        self._keys.clear()

    def process(self, image: Image) -> ProcessedImage:
        """The image as the processor makes it. Raises PromptRejected."""
        key = self._key(image)
        if found := self._kept.get(key):
            self._kept.move_to_end(key)
            return found
        picture = decode(image)
        try:
            processed = replace(self.process_picture(picture), key=key)
        except Exception as error:  # foreign code, which knows sizes that it can't take
            raise PromptRejected(
                f"The image '{image.origin}' can't be processed for this model: {one_line(error)}", image.origin
            ) from error
        self._kept[key] = processed
        self._held += _size(processed)
        while self._held > self._most and len(self._kept) > 1:
            self._held -= _size(self._kept.popitem(last=False)[1])
        return processed

    def expand(self, text: str, images: Sequence[Image], is_marked: str) -> str:
        """A rendered prompt with each placeholder replaced by what stands for its image.

        is_marked: what stands before a placeholder that is text of a message. Raises PromptRejected.
        """
        behind = f"(?<!{re.escape(is_marked)})" if is_marked else ""
        parts = re.split(behind + re.escape(self.placeholder), text)
        if len(parts) != len(images) + 1:
            raise PromptRejected(
                f"The chat template of this model shows {len(parts) - 1} of {len(images)} images. "
                f"A message may not have {self.placeholder!r} in its text.",
                images[0].origin,
            )
        shown = [self.process(image).text + part for image, part in zip(images, parts[1:], strict=True)]
        return "".join([parts[0], *shown])

    def place(self, tokens: Sequence[int], images: Sequence[Image]) -> tuple[PlacedImage, ...]:
        """The images with their places among a prompt's tokens. Ends the prompt. Raises PromptRejected."""
        positions = np.flatnonzero(np.asarray(tokens) == self._token).tolist()
        placed, start = [], 0
        for image in images:
            processed = self.process(image)
            placed.append(PlacedImage(processed, tuple(positions[start : start + processed.tokens])))
            start += processed.tokens
        self._keys.clear()  # or the files would stay until the next prompt
        if start != len(positions):
            raise PromptRejected(
                f"The prompt has {len(positions)} tokens of images where {start} were expected. "
                "A message may not have the model's image token in its text.",
                images[0].origin,
            )
        return tuple(placed)

    def _key(self, image: Image) -> int:
        """Key of an image: of its file, its detail, and the versions of what processes it."""
        place = id(image.data), image.detail == "low"
        if place not in self._keys:  # the file is held, so that its identity stays its own
            digest = hashlib.sha256(f"{image.digest} {self._versions}".encode()).hexdigest()
            self._keys[place] = image.data, -1 - int(digest[:15], 16)
        return self._keys[place][1]

    def process_picture(self, picture: Any) -> ProcessedImage:
        """A picture (of Pillow, RGB) as the processor makes it, without a key."""
        width, height = picture.size
        if self._most_pixels and width * height > self._most_pixels:
            scale = (self._most_pixels / (width * height)) ** 0.5
            picture = picture.resize((max(1, int(width * scale)), max(1, int(height * scale))))
        made = self._processor(text=[self.placeholder], images=[picture])
        inputs = {name: np.asarray(value) for name, value in made.items() if name not in _NOT_FOR_TOWERS}
        tokens = int((np.asarray(made["input_ids"]) == self._token).sum())
        grid = None
        if self._merge and (sizes := inputs.get("image_grid_thw")) is not None:
            grid = int(sizes[0][1]) // self._merge, int(sizes[0][2]) // self._merge
        return ProcessedImage(0, self._tokenizer.text, tokens, inputs, grid)


class _Recorder:
    """A tokenizer that keeps the text that it was last given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def __call__(self, text: Any = None, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self._tokenizer(text, **options)

    def encode(self, text: str, **options: Any) -> Any:
        self.text = text
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@functools.cache
def _versions() -> str:
    return " ".join(f"{package} {metadata.version(package)}" for package in ("mlx-vlm", "transformers", "pillow"))


def show_result_images(prompt: ChatPrompt) -> ChatPrompt:
    """The prompt with the images of tools' results in a message of the user's behind them.

    Templates have a place for text in a result, few of them one for an image.
    """
    messages: list[Message] = []
    waiting: list[Part] = []
    for message in [*prompt.conversation, None]:
        if waiting and (message is None or message.role != "tool"):
            messages.append(Message("user", (Text(RESULT_IMAGES), *waiting), messages[-1].origin))
            waiting = []
        if message is None:
            break
        if message.result and message.images:
            waiting += message.images
            parts = [replace(part, images=()) if isinstance(part, ToolResult) else part for part in message.parts]
            message = replace(message, parts=tuple(parts))
        messages.append(message)
    return replace(prompt, conversation=tuple(messages))


def _size(image: ProcessedImage) -> int:
    return sum(int(array.nbytes) for array in image.inputs.values())
