"""Runner of vision models: a text model whose prompts may have images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading.loader import LoadedModel
from mlxserver.engine.loading.outcome import complete_or_nothing, naming
from mlxserver.engine.loading.sight_layers import attends_within_images, give_sight, rope_sections
from mlxserver.engine.loading.sources import Progress
from mlxserver.engine.loading.unsupported import naming_what_is_missing
from mlxserver.engine.loading.vision_architecture import FEATURE_BYTES, PIXEL_BYTES, inspect_vision_architecture
from mlxserver.engine.loading.vision_model import Tower, image_token, load_processor, load_tower, with_image_token
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.prompt.images import ImageProcessor
from mlxserver.engine.requests import FormattedPrompt
from mlxserver.engine.runners.text import ModelBatch, TextRunner
from mlxserver.engine.scheduler.images import Eyes, ImagesOfPrompt
from mlxserver.engine.sequence import PromptImages


@dataclass(frozen=True, slots=True)
class Vision:
    """Vision part of a loaded model. processor: on the tokenizer worker; tower, eyes: on the engine thread."""

    processor: ImageProcessor
    tower: Tower
    eyes: Eyes


class VisionRunner(TextRunner):
    """A loaded vision model."""

    def __init__(self, spec: ModelSpec, loaded: LoadedModel, batch: ModelBatch, vision: Vision) -> None:
        loaded = replace(loaded, weight_bytes=loaded.weight_bytes + vision.tower.weight_bytes)
        super().__init__(spec, loaded, batch, vision.processor)
        self._eyes = vision.eyes
        self.facts = replace(self.facts, kind="vision", capabilities=self.facts.capabilities | {"vision"})

    def _seen(self, prompt: FormattedPrompt) -> PromptImages | None:
        return ImagesOfPrompt(self._eyes, prompt.images, len(prompt.tokens)) if prompt.images else None


def load_vision(spec: ModelSpec, loaded: LoadedModel, progress: Progress, policy: ExecutionPolicy) -> Vision:
    """Read the vision part of a model whose text model is loaded, and have that see. Raises LoadFailed, LoadAborted.

    Where it raises, the text model is as it was.
    """

    def load() -> Vision:
        with naming(f"the vision part in {loaded.path} can't be used"), naming_what_is_missing():
            pixels = inspect_vision_architecture(loaded.config).most_pixels(policy)
            own = load_processor(loaded.path)
            config = with_image_token(loaded.config, own)
            processor = ImageProcessor(own, image_token(config), PIXEL_BYTES, pixels)
            tower = load_tower(loaded.path, config, progress, policy)
            tower.check(processor.probe())
            sight = give_sight(loaded.model, loaded.config, tower.layers_added)
        eyes = Eyes(
            tower,
            sight,
            FEATURE_BYTES,
            has_grid_positions=bool(rope_sections(loaded.config)[0]),
            sees_whole=attends_within_images(loaded.config),
        )
        return Vision(processor, tower, eyes)

    return complete_or_nothing(spec, load)
