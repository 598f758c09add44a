"""Tiny models with a head that predicts more tokens, on disk in the layout of their makers."""

import json

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten

from mlxserver.engine.loading import mtp
from tests.support.architectures import _MLA, _MOE, BASE
from tools.harness.models import tiny_llama

GLM = BASE | _MOE | {
    "model_type": "glm4_moe",
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "head_dim": 32,
    "hidden_size": 128,
}  # fmt: skip
DEEPSEEK = BASE | _MOE | _MLA | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
LITE = DEEPSEEK | {"model_type": "glm4_moe_lite"}
MIMO = BASE | {"model_type": "mimo", "num_hidden_layers": 3, "num_nextn_predict_layers": 1}
CONFIGS = {"glm": GLM, "deepseek": DEEPSEEK, "lite": LITE, "mimo": MIMO}


def write_model(path, config, edit=lambda weights: None):
    """Write a model of random weights with its head, in two files with an index; returns its directory.

    edit: changes the weights, by the names that they have in mlx-lm's class and in its head, before they are written.
    """
    tiny_llama(path)
    given = json.loads((path / "config.json").read_text())
    config = config | {name: given[name] for name in ("vocab_size", "eos_token_id", "torch_dtype")}
    model_class, arguments = mtp.classes_with_head(config)
    mx.random.seed(1)
    model = model_class(arguments.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    edit(weights)
    makers = dict(_in_layout_of_makers(weights, config))
    (path / "model.safetensors").unlink(missing_ok=True)
    names = sorted(makers)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in files.items():
        mx.save_safetensors(str(path / file), {name: makers[name] for name in own})
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))
    return path


def _in_layout_of_makers(weights, config):
    """Each weight by its published name: experts one by one, MLA's two projections as one, what is shared twice."""
    model_class, _ = mtp.classes_with_head(config)
    layout = next(own for base, own in mtp.LAYOUTS.items() if issubclass(model_class, base))
    published = {name: there for there, name in layout.names.items()}
    behind = "model.mtp_layers.0" if config["model_type"] == "mimo" else f"model.layers.{config['num_hidden_layers']}"
    for name, array in weights.items():
        if name.startswith("mtp."):
            inner = name.removeprefix("mtp.").removeprefix("layer.")
            module, _, kind = inner.rpartition(".")
            name = f"{behind}.{published.get(module, module)}.{kind}"
        if ".switch_mlp." in name:
            for expert in range(array.shape[0]):
                yield name.replace("switch_mlp", f"experts.{expert}"), array[expert]
        elif name.endswith("embed_q.weight"):
            heads = name.replace("embed_q", "{}")
            values = weights[_key(heads, "unembed_out", config)]
            both = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            yield heads.format("kv_b_proj"), both.reshape(-1, both.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            yield name, array
    if config["model_type"] != "mimo":
        yield f"{behind}.embed_tokens.weight", weights["model.embed_tokens.weight"]
        yield f"{behind}.shared_head.head.weight", weights["lm_head.weight"]


def _key(heads, name, config):
    """The name in mlx-lm's class of a published one."""
    behind = f"model.layers.{config['num_hidden_layers']}."
    return heads.format(name).replace(behind, "mtp.layer.")
