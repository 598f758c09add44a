"""What the files of a model state, without reading its weights."""

import json
import struct

from mlxserver.engine.description import Description
from mlxserver.engine.loading.description import describe


def safetensors(path, arrays):
    """A file with this header and no weights."""
    header = json.dumps({"__metadata__": {}, **{n: {"dtype": d, "shape": s} for n, (d, s) in arrays.items()}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_a_real_checkpoint_is_described(tiny_llama_path):
    found = describe(str(tiny_llama_path))
    assert (found.architecture, found.quantization, found.layers > 0, found.heads > 0) == ("llama", "F32", True, True)
    assert found.stored_bytes > 4 * found.parameters > 0
    assert "messages" in found.template
    assert not found.may_think


def test_packed_weights_are_counted_unpacked(tmp_path):
    config = {"model_type": "x", "quantization": {"bits": 4, "group_size": 64}, "text_config": {"n_layers": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "<think>"}, {"name": "rag", "template": "y"}]})
    )
    arrays = {
        "a.weight": ("U32", [8, 16]),  # 8 x 128 weights of 4 bits
        "a.scales": ("F16", [8, 2]),
        "a.biases": ("F16", [8, 2]),
        "norm.weight": ("F16", [128]),
        "b.biases": ("F16", [3]),
    }
    safetensors(tmp_path / "model.safetensors", arrays)
    found = describe(str(tmp_path))
    assert (found.parameters, found.quantization, found.layers) == (8 * 128 + 128 + 3, "Q4", 2)
    assert (found.template, found.may_think) == ("<think>", True)


def test_what_is_not_here_or_damaged_is_not_known(tmp_path):
    assert describe("org/never-downloaded") == describe("no source") == describe(str(tmp_path)) == Description()
    (tmp_path / "config.json").write_text("[]")
    assert describe(str(tmp_path)) == Description()
    (tmp_path / "config.json").write_text('{"model_type": "x", "quantization": 5}')
    (tmp_path / "tokenizer_config.json").write_text("nonsense")
    for damaged in (b"", b"\xff" * 8, struct.pack("<Q", 4) + b"oops", struct.pack("<Q", 2) + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        found = describe(str(tmp_path))
        assert (found.architecture, found.parameters, found.template) == ("x", 0, "")
