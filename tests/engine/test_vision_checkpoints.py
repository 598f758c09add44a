"""Checkpoints with towers for images, served as text models: loaded, eight requests together, a second turn."""

import json

from mlxserver.engine.mlx import mx

import pytest
from mlx.utils import tree_flatten

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading import loader
from mlxserver.engine.loading.estimate import estimate
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import CPU, METAL
from mlxserver.engine.runners.self_check import fitting_policy
from tools.harness.models import tiny_llama
from tools.zoo import models
from tools.zoo.comparison import problems

pytestmark = pytest.mark.skipif(not device.is_cpu(), reason="a CPU computes float32, which can be compared")

LENGTHS = (45, 7, 20, 70, 33, 12, 60, 28)  # tokens of eight prompts
AS_IT_IS = {"": ""}
NESTED = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}  # of transformers
# Names of mlx-lm's weights and what they begin with in the checkpoint; weights beside them that a text model lacks.
LAYOUTS = {
    "qwen3_5-vl, as mlx-vlm has it": (AS_IT_IS, ["vision_tower.blocks.0.attn.qkv.weight"]),
    "qwen3_5-vl, as published": (NESTED, ["model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.up_proj.weight"]),
    "qwen3_5_moe-vl, as published": (NESTED, ["model.visual.patch_embed.proj.weight"]),
    "gemma3": (AS_IT_IS, ["vision_tower.vision_model.a.weight", "multi_modal_projector.mm_soft_emb_norm.weight"]),
    "gemma4, as published": (NESTED, ["model.vision_tower.a.weight", "model.embed_vision.embedding_projection.weight"]),
    "kimi_k25": (AS_IT_IS, ["vision_tower.encoder.blocks.0.mlp.fc0.weight", "mm_projector.linear_1.weight"]),
    "kimi_vl": (AS_IT_IS, ["vision_tower.encoder.blocks.0.mlp.fc0.weight", "multi_modal_projector.linear_1.weight"]),
    "llama4": (AS_IT_IS, ["vision_model.model.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"]),
    "mistral3": (AS_IT_IS, ["vision_tower.transformer.layers.0.a.weight", "multi_modal_projector.linear_1.weight"]),
    "mistral3, as published": (NESTED, ["model.vision_tower.a.weight", "model.multi_modal_projector.linear_1.weight"]),
    "qwen3_vl, as published": (NESTED, ["model.visual.blocks.0.attn.qkv.weight"]),
    "pixtral": (AS_IT_IS, ["vision_tower.transformer.layers.0.a.weight", "multi_modal_projector.linear_1.weight"]),
    "lfm2-vl": (AS_IT_IS, ["vision_tower.a.weight", "multi_modal_projector.linear_1.weight"]),
    **{
        f"{name}, as transformers 5 nests it": (NESTED, ["model.vision_tower.a.weight", "model.projector.weight"])
        for name in ("gemma3", "llama4", "kimi_k25", "kimi_vl", "pixtral", "lfm2-vl", "llava", "qwen2_5_vl")
    },
}


def renamed(name, prefixes):
    own = next((own for own in prefixes if name.startswith(own)), None)
    return name if own is None else prefixes[own] + name.removeprefix(own)


def checkpoint(path, name, prefixes, towers):
    """A directory of the zoo's weights under a checkpoint's names, beside those of towers as large as all of them."""
    tiny_llama(path)
    weights = {renamed(own, prefixes): array for own, array in tree_flatten(models.build(name).parameters())}
    count = sum(array.size for array in weights.values()) // len(towers) // 64
    beside = {tower: mx.ones((count, 64)) for tower in towers}
    mx.save_safetensors(str(path / "model.safetensors"), weights | beside, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(models.config(name) | {"vision_config": {"hidden_size": 64}}))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_with_towers_is_served_as_the_text_model_that_it_has(tmp_path, layout):
    name, (prefixes, towers) = layout.split(",")[0], LAYOUTS[layout]
    spec = ModelSpec("m", checkpoint(tmp_path / "m", name, prefixes, towers))
    expected = estimate(spec)
    loaded = loader.load(spec, policy=CPU)
    assert loaded.weight_bytes == expected.weights
    assert problems(loaded.model, fitting_policy(loaded.model, CPU, layout), models.build(name), LENGTHS) == {}


@pytest.mark.parametrize("layout", ["qwen3_5-vl, as published", "gemma3", "llama4", "kimi_k25"])
def test_the_towers_are_not_estimated_where_weights_stay_as_they_are_stored(tmp_path, layout):
    name, (prefixes, towers) = layout.split(",")[0], LAYOUTS[layout]
    spec = ModelSpec("m", checkpoint(tmp_path / "m", name, prefixes, towers))
    stored = sum(array.nbytes for _, array in tree_flatten(models.build(name).parameters()))
    assert estimate(spec, METAL).weights == pytest.approx(stored, rel=0.15)
