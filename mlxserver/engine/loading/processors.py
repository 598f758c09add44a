"""What mlx-vlm's processors of single types lack, added to a loaded one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

IMAGE = "<image>"  # InternVL's text in place of an image


def complete_processor(model_type: str, processor: Any) -> Any:
    """The processor of a type's images with what it lacks."""
    _ADDED.get(model_type, lambda _: None)(processor)
    return processor


def image_token_of(processor: Any) -> int | None:
    """Id of the token that stands for a part of an image, of a processor that states it; config.json may not."""
    found = getattr(processor, "img_context_token_id", None)
    return found if isinstance(found, int) else None


def _name_placeholder(processor: Any) -> None:
    processor.image_token = IMAGE


def _show_whole_picture(processor: Any) -> None:
    """Behind the tiles of a picture the whole of it, as Llama 4's makers show it; there are places for it already."""
    images = processor.image_processor
    split = images._split_into_tiles

    def split_and_whole(image: Any, ratio: tuple[int, int]) -> list[Any]:
        tiles: list[Any] = split(image, ratio)
        return tiles if len(tiles) == 1 else [*tiles, *split(image, (1, 1))]

    images._split_into_tiles = split_and_whole


_ADDED: dict[str, Callable[[Any], None]] = {"internvl_chat": _name_placeholder, "llama4": _show_whole_picture}
