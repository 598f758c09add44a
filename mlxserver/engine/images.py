"""Pictures of images."""

import io

from PIL import Image as pillow

from mlxserver.engine.conversation import Image


def decode(image: Image) -> pillow.Image:
    """The picture of an image in mode RGB."""
    return pillow.open(io.BytesIO(image.data)).convert("RGB")
