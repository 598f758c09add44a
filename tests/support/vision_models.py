"""Requests with pictures for tiny vision models, and mlx-vlm's own answers to compare with."""

import io
import itertools
import warnings

from mlx_vlm.generate import stream_generate
from mlx_vlm.utils import load
from PIL import Image as Picture

from mlxserver.engine.conversation import Image, Message, Text
from mlxserver.engine.loading.processors import complete_processor
from mlxserver.engine.requests import ChatPrompt, GenerationRequest
from tests.support.batch_driver import Driver

TOKENS = 8  # of an answer


def attached(picture):
    """The image of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return Image(file.getvalue(), "messages[0].content[0]")


def question(text, *pictures, turns=(), **fields):
    """A greedy request with pictures before its text. turns: messages before it."""
    message = Message("user", (*map(attached, pictures), Text(text)), "messages[0]")
    fields = {"max_tokens": TOKENS, "ignore_eos": True} | fields
    return GenerationRequest(ChatPrompt((*turns, message)), {"temperature": 0.0}, **fields)


def answers(runner, requests):
    """Tokens of each request, all of them at once, and how many tokens of each prompt came from the prefix cache."""
    ids = itertools.count()
    sequences = [runner.prepare(runner.preprocess(request), ids)[0][0] for request in requests]
    driver = Driver(runner.batch, *sequences)
    driver.finish()
    return [driver.tokens[each.id] for each in sequences], [driver.cached[each.id] for each in sequences]


class Reference:
    """mlx-vlm's own model of a directory."""

    def __init__(self, path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that are not used
            self._model, self._processor = load(str(path))
        complete_processor(self._model.config.model_type, self._processor)
        if type(self._processor).__name__ == "LlavaProcessor":  # gives it options that it does not take any more
            process = self._processor.image_processor
            self._processor.image_processor = lambda images, **options: process(images)

    def answer(self, request):
        """Tokens that mlx-vlm generates greedily for the messages of a request, and the number of the prompt's."""
        prompt = request.prompt
        pictures = [picture_of(image) for message in prompt.conversation for image in message.images]
        render = self._processor.tokenizer.apply_chat_template
        options = {"tools": [{"type": "function", "function": tool.function} for tool in prompt.tools] or None}
        options |= prompt.template_kwargs
        messages = list(map(_written, prompt.conversation))
        text = render(messages, tokenize=False, add_generation_prompt=True, **options)
        options = {"max_tokens": request.max_tokens, "temperature": 0.0}
        parts = list(stream_generate(self._model, self._processor, text, image=pictures or None, **options))
        return [part.token for part in parts][: request.max_tokens], parts[0].prompt_tokens

    def text(self, tokens):
        """The text of tokens."""
        return self._processor.tokenizer.decode(tokens)


def _written(message):
    """A message as transformers' templates take it."""
    if message.result:
        parts = [{"type": "text", "text": message.text}, *({"type": "image"} for _ in message.images)]
        return {"role": "tool", "tool_call_id": message.result.call_id, "content": parts}
    parts = [
        {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text}
        for part in message.parts
        if isinstance(part, Image | Text)
    ]
    calls = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    return {"role": message.role, "content": parts} | ({"tool_calls": calls} if calls else {})


def picture_of(image):
    """The picture of an image."""
    return Picture.open(io.BytesIO(image.data)).convert("RGB")
