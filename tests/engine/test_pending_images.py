"""Chunks of prompts with images: none has a part of an image that has to be seen at once, and the last token stays."""

import pytest

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.requests import PlacedImage, ProcessedImage
from mlxserver.engine.scheduler.images import Eyes, ImagesOfPrompt
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.sequence import Sequence


def prompt_of(length, *images):
    """A prompt of so many tokens, images at these of them."""
    placed = [PlacedImage(ProcessedImage(-1, "", stop - start), tuple(range(start, stop))) for start, stop in images]
    seen = ImagesOfPrompt(Eyes(None, None, 0, sees_whole=True), placed, length)
    return PendingPrompt([Sequence(1, tuple(range(length)), SamplingParams(), 1, images=seen)], 0.0)


def chunks(prompt, most):
    """The lengths of its chunks."""
    found = []
    while prompt.remaining:
        found.append(len(prompt.next(most)))
        prompt.done += found[-1]
        assert found[-1] > 0
        assert prompt.remaining >= 0
    return found


@pytest.mark.parametrize("most", [1, 3, 8, 100])
@pytest.mark.parametrize("images", [[(2, 10)], [(0, 4), (4, 10)], [(9, 10)], [(0, 10)], [(3, 5)]])
def test_a_chunk_never_takes_the_last_token(images, most):
    assert sum(chunks(prompt_of(10, *images), most)) == 9


def test_an_image_is_in_one_chunk():
    assert chunks(prompt_of(12, (2, 8)), 4) == [2, 6, 3]


def test_a_stop_is_neither_in_an_image_nor_at_the_last_token():
    prompt = prompt_of(10, (4, 10))
    assert [prompt.whole(0, stop) for stop in (3, 6, 9)] == [3, 4, 4]
    assert prompt.whole(4, 9) == 9
