"""Models of this machine are found where programs keep them, named, and described by their headers."""

import json
import shutil
import struct
from dataclasses import replace

from mlxserver.engine.mlx import mx

import pytest

from mlxserver.engine.loading import gguf, kinds
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.library.facts import CONVERTIBLE, Facts, Unusable, read_facts
from mlxserver.engine.loading.library.layouts import Folder, folders
from mlxserver.engine.loading.library.remove import remove
from mlxserver.engine.loading.library.scan import Scanner
from mlxserver.engine.platform.policy import WeightPolicy, current
from tests.support.local_models import COMMIT, digest_of, in_hub, in_lm_studio, in_ollama
from tools.harness.encoder_models import tiny_cross_encoder, tiny_embedder, tiny_judge
from tools.harness.models import tiny_llama
from tools.harness.tiny_gguf import CONTEXT, write_tiny_gguf


@pytest.fixture(scope="module")
def mlx(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("made") / "tiny-4bit")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("made") / "tiny.gguf")


def found(place, path):
    return {model.key: model for model in Scanner().scan_folders([Folder(place, path)])}


# -- where models are


def test_programs_variables_say_where_their_models_are(tmp_path):
    def paths(**environ):
        return {folder.place: str(folder.path) for folder in folders(environ, tmp_path, ())}

    assert paths()["huggingface"] == f"{tmp_path}/.cache/huggingface/hub"
    assert paths(XDG_CACHE_HOME="/c")["huggingface"] == "/c/huggingface/hub"
    assert paths(HF_HOME="/hf", XDG_CACHE_HOME="/c")["huggingface"] == "/hf/hub"
    assert paths(HF_HUB_CACHE="/cache", HF_HOME="/hf")["huggingface"] == "/cache"
    assert paths()["ollama"] == f"{tmp_path}/.ollama/models"
    assert paths(OLLAMA_MODELS="/o")["ollama"] == "/o"
    studio = [str(folder.path) for folder in folders({}, tmp_path, ()) if folder.place == "lmstudio"]
    assert studio == [f"{tmp_path}/.lmstudio/models", f"{tmp_path}/.cache/lm-studio/models"]


def test_folders_that_do_not_exist_have_no_models(tmp_path):
    assert Scanner().scan_folders(folders({}, tmp_path, ["/nowhere"])) == ()


def test_a_hub_cache(tmp_path, mlx, gguf_file):
    root = in_hub(tmp_path, "org/Tiny-4bit", mlx)
    in_hub(tmp_path, "org/only-gguf", gguf_file)
    (tmp_path / "datasets--org--data").mkdir()
    models = found("huggingface", tmp_path)
    assert [*models] == ["org/Tiny-4bit", "org/only-gguf"]
    tiny = models["org/Tiny-4bit"]
    assert (tiny.alias, tiny.fault, tiny.path) == ("tiny-4bit", None, root / "snapshots" / COMMIT)
    assert models["org/only-gguf"].facts.format == "gguf"


def test_the_main_branch_of_a_hub_cache_is_taken_before_later_snapshots(tmp_path, mlx):
    root = in_hub(tmp_path, "org/tiny", mlx)
    (root / "snapshots" / "later").mkdir()
    assert found("huggingface", tmp_path)["org/tiny"].path.name == COMMIT


def test_lm_studios_folders(tmp_path, mlx, gguf_file):
    in_lm_studio(tmp_path, "publisher/tiny-mlx", mlx)
    in_lm_studio(tmp_path, "publisher/Tiny-GGUF", gguf_file)
    in_lm_studio(tmp_path, "other/two", gguf_file)
    shutil.copy(gguf_file, tmp_path / "other" / "two" / "second.gguf")
    shutil.copy(gguf_file, tmp_path / "other" / "two" / "mmproj-second.gguf")
    models = found("lmstudio", tmp_path)
    assert [*models] == ["other/two/second", "other/two/two", "publisher/Tiny-GGUF", "publisher/tiny-mlx"]
    assert [model.alias for model in models.values()] == ["second", "two", "tiny-gguf", "tiny-mlx"]


def test_ollamas_manifests_and_blobs(tmp_path, gguf_file):
    in_ollama(tmp_path, "tiny", "latest", gguf_file)
    in_ollama(tmp_path, "tiny", "1b", gguf_file)
    in_ollama(tmp_path, "own", "q4", gguf_file, namespace="someone")
    in_ollama(tmp_path, "far", "1b", gguf_file, host="hf.co", namespace="org")
    models = found("ollama", tmp_path)
    assert {key: model.alias for key, model in models.items()} == {
        "tiny:1b": None,
        "tiny:latest": "tiny",
        "hf.co/org/far:1b": "far:1b",
        "someone/own:q4": "own:q4",
    }
    assert {model.path.name for model in models.values()} == {f"sha256-{digest_of(gguf_file)}"}


def test_a_folder_of_ones_own(tmp_path, mlx, gguf_file):
    shutil.copy(gguf_file, tmp_path / "My model.gguf")
    shutil.copytree(mlx, tmp_path / "deep" / "er" / "tiny")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    assert [*found("directory", tmp_path)] == ["My-model", "deep/er/tiny"]
    assert [*found("directory", mlx)] == ["tiny-4bit"]


# -- what they are called


def test_short_names_are_unique(tmp_path, mlx):
    for name in ("one/tiny", "two/tiny", "two/other"):
        in_lm_studio(tmp_path, name, mlx)
    assert {key: model.alias for key, model in found("lmstudio", tmp_path).items()} == {
        "one/tiny": None,
        "two/tiny": None,
        "two/other": "other",
    }


def test_two_places_with_one_name(tmp_path, mlx):
    in_hub(tmp_path / "hub", "org/tiny", mlx)
    in_lm_studio(tmp_path / "studio", "org/tiny", mlx)
    searched = [Folder("huggingface", tmp_path / "hub"), Folder("lmstudio", tmp_path / "studio")]
    assert [model.key for model in Scanner().scan_folders(searched)] == ["org/tiny", "lmstudio/org/tiny"]


def test_a_model_that_is_found_twice_is_listed_once(tmp_path, mlx):
    in_lm_studio(tmp_path, "org/tiny", mlx)
    searched = [Folder("directory", tmp_path / "org"), Folder("lmstudio", tmp_path)]
    assert [model.key for model in Scanner().scan_folders(searched)] == ["tiny"]


# -- what they are


def test_facts_of_an_mlx_directory(mlx):
    facts = read_facts(mlx)
    assert (facts.format, facts.architecture, facts.quantization) == ("mlx", "llama", "float32")
    assert facts.context_length == 2048
    assert facts.kv_values == 2 * 2 * 2 * 16
    assert facts.parameters * 4 == pytest.approx(facts.stored_bytes, rel=0.02)
    more = facts.needed_bytes(WeightPolicy.STORED, 1000) - facts.needed_bytes(WeightPolicy.STORED, 0)
    assert more == 1000 * facts.kv_values * 2


def test_packed_weights_are_counted_singly(tmp_path, mlx):
    whole = read_facts(mlx).parameters
    packed = quantized(shutil.copytree(mlx, tmp_path / "packed"))
    assert read_facts(packed).quantization == "4-bit"
    assert read_facts(packed).parameters == whole


def test_what_a_model_needs_follows_the_format_of_its_weights(tmp_path, mlx):
    config = {"torch_dtype": "bfloat16", "quantization": {"bits": 4, "group_size": 32}}
    facts = Facts("mlx", "llama", "4-bit", 1_000_000, None, 0, 625_000, config=config)
    beside = facts.needed_bytes(WeightPolicy.STORED, 0) - facts.stored_bytes
    held = {weights: facts.needed_bytes(weights, 0) - beside for weights in WeightPolicy}
    assert held == {
        WeightPolicy.STORED: 625_000,
        WeightPolicy.FLOAT32: 4_000_000,
        WeightPolicy.QUANTIZED: 625_000,
        WeightPolicy.BFLOAT16: 2_000_000,
    }
    without_kernel = replace(facts, config=config | {"quantization": {"bits": 6, "group_size": 32}})
    assert without_kernel.needed_bytes(WeightPolicy.QUANTIZED, 0) - beside == 4_000_000
    assert read_facts(mlx).needed_bytes(WeightPolicy.QUANTIZED, 0) == 4 * read_facts(mlx).parameters + beside


def quantized(path):
    from mlxserver.engine.mlx import mx

    weights = mx.load(str(path / "model.safetensors"))
    for name in [name for name, array in weights.items() if array.ndim == 2]:
        packed, scales, biases = mx.quantize(weights.pop(name), group_size=32, bits=4)
        base = name.removesuffix(".weight")
        weights |= {name: packed, f"{base}.scales": scales, f"{base}.biases": biases}
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 32}}))
    return path


def test_facts_of_a_gguf_file(gguf_file):
    facts = read_facts(gguf_file)
    assert (facts.format, facts.architecture, facts.quantization) == ("gguf", "llama", "F32")
    assert facts.context_length == CONTEXT
    known = gguf.checkpoint_metadata("tiny", gguf_file, current().weights)
    assert (
        facts.stored_bytes
        == known.stored_bytes
        == facts.parameters * (4 if current().weights.computes_in_float32 else 2)
    )


@pytest.mark.parametrize(
    ("make", "kind", "architecture"),
    [
        (lambda path: tiny_embedder(path, "modernbert"), "embedding", "modernbert"),
        (lambda path: tiny_embedder(path, "gemma3_text"), "embedding", "gemma3_text"),
        (lambda path: tiny_embedder(path, "qwen3"), "embedding", "qwen3"),
        (lambda path: tiny_cross_encoder(path, "xlm-roberta"), "rerank", "xlm-roberta"),
        (tiny_judge, "rerank", "qwen3"),
        (tiny_llama, "text", "llama"),
    ],
)
def test_a_model_has_the_kind_of_its_files(tmp_path, make, kind, architecture):
    facts = read_facts(make(tmp_path / "org" / "tiny"))
    assert (facts.kind, facts.architecture, facts.kv_values > 0) == (kind, architecture, kind == "text")


def test_a_model_that_sees_is_known_by_its_processor(tmp_path, mlx):
    path = shutil.copytree(mlx, tmp_path / "seeing")
    changed(model_type="smolvlm", vision_config={"hidden_size": 8})(path)
    (path / "preprocessor_config.json").write_text("{}")
    facts = read_facts(path)
    assert (facts.kind, facts.kv_values > 0) == ("vision", True)
    stored = facts.stored_bytes
    mx.save_safetensors(str(path / "model-tower.safetensors"), {"vision_tower.weight": mx.zeros((64, 64))})
    assert read_facts(path).stored_bytes > stored + 64 * 64 * 4


def test_the_types_of_encoders_are_the_ones_that_mlx_vlm_has():
    from mlx_vlm.embedding_loader import EMBEDDING_MODEL_REMAPPING
    from mlx_vlm.reranker import reranker_kind
    from mlx_vlm.utils import get_model_and_args

    for name in kinds.EMBEDDERS:
        module, _ = get_model_and_args({"model_type": EMBEDDING_MODEL_REMAPPING.get(name, name)})
        assert module.Model
    assert EMBEDDING_MODEL_REMAPPING.keys() < kinds.EMBEDDERS
    assert all(reranker_kind({"model_type": name}) for name in kinds.RERANKERS)


def test_the_converters_architectures_are_the_ones_it_has():
    from gguf2mlx.gguf2mlx import CONVERTIBLE_ARCHES

    assert set(CONVERTIBLE_ARCHES) == CONVERTIBLE


def test_headers_are_read_once_while_a_file_does_not_change(tmp_path, gguf_file):
    path = tmp_path / "tiny.gguf"
    shutil.copy(gguf_file, path)
    scanner = Scanner()
    first, second = (scanner.scan_folders([Folder("directory", tmp_path)])[0] for _ in range(2))
    assert first.facts is second.facts
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in scanner.scan_folders([Folder("directory", tmp_path)])[0].fault


# -- what is wrong with them


def without(name):
    return lambda path: (path / name).unlink()


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-10])


def changed(**fields):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without("model.safetensors"), "it has no weights"),
        (cut("model.safetensors"), "model.safetensors has .* bytes, and should have"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 20), "cut short or no safetensors file"),
        (lambda path: (path / "model.safetensors").write_bytes(bytes(8)), "it is damaged"),
        (cut("config.json"), "it is damaged"),
        (changed(model_type="bert-like"), "mlx-lm has no architecture 'bert-like'"),
        (changed(model_type="nomic_bert"), "mlx-vlm has no embedding model of the type 'nomic_bert'"),
        (
            changed(model_type="distilbert", architectures=["DistilBertForSequenceClassification"], num_labels=1),
            "mlx-vlm has no reranker of the type 'distilbert'",
        ),
        (changed(model_type=7), "states no model_type"),
        (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "it has no tokenizer"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
            ),
            "model-00002-of-00002.safetensors missing",
        ),
    ],
)
def test_a_damaged_directory_has_its_reason(tmp_path, mlx, damage, reason):
    path = shutil.copytree(mlx, tmp_path / "org" / "tiny")
    damage(path)
    with pytest.raises(Unusable, match=reason):
        read_facts(path)
    (model,) = Scanner().scan_folders([Folder("lmstudio", tmp_path)])
    assert (model.key, model.alias, model.facts) == ("org/tiny", None, None)


@pytest.mark.parametrize("length", [0, 4, 12, 30, 200, 3000, 100_000])
def test_a_gguf_file_that_was_cut_anywhere_has_its_reason(tmp_path, gguf_file, length):
    (tmp_path / "tiny.gguf").write_bytes(gguf_file.read_bytes()[:length])
    (model,) = Scanner().scan_folders([Folder("directory", tmp_path)])
    assert model.facts is None
    assert model.fault


def test_a_blob_that_is_missing_has_its_reason(tmp_path, mlx, gguf_file):
    root = in_hub(tmp_path / "hub", "org/tiny", mlx)
    (root / "snapshots" / COMMIT / "model.safetensors").resolve().unlink()
    assert "not downloaded to its end" in found("huggingface", tmp_path / "hub")["org/tiny"].fault
    in_ollama(tmp_path / "ollama", "gone", "1b", gguf_file)
    shutil.rmtree(tmp_path / "ollama" / "blobs")
    in_ollama(tmp_path / "ollama", "adapted", "1b", gguf_file, kinds=("model", "adapter"))
    in_ollama(tmp_path / "ollama", "empty", "1b", gguf_file, kinds=("tensor",))
    in_ollama(tmp_path / "ollama", "broken", "1b", gguf_file).write_text("{")
    in_ollama(tmp_path / "ollama", "odd", "1b", gguf_file).write_text('{"layers": [{"mediaType": [], "digest": {}}]}')
    models = found("ollama", tmp_path / "ollama")
    assert models["adapted:1b"].fault == "it has an adapter in Ollama's format"
    assert models["empty:1b"].fault == "its manifest names no GGUF file"
    assert models["broken:1b"].fault == "its manifest is damaged"
    assert models["odd:1b"].fault == "its manifest names no GGUF file"


def test_a_gguf_file_with_a_tensor_of_any_number_of_dimensions_is_damaged(tmp_path):
    """Their product would be a number of gigabytes."""
    name, tensors, fields, dimensions = 0, 1, 0, 2**32 - 1
    header = struct.pack("<4sIQQQI", b"GGUF", 3, tensors, fields, name, dimensions)
    (tmp_path / "wide.gguf").write_bytes(header + struct.pack("<Q", 2**63) * 1000)
    with pytest.raises(Unusable, match="its header is damaged"):
        read_facts(tmp_path / "wide.gguf")


def test_parts_of_a_model_are_listed_once_with_the_reason(tmp_path, gguf_file):
    for part in (1, 2):
        shutil.copy(gguf_file, tmp_path / f"big-0000{part}-of-00002.gguf")
    (model,) = Scanner().scan_folders([Folder("directory", tmp_path)])
    assert (model.key, model.facts) == ("big", None)
    assert "in 2 parts" in model.fault


def test_nothing_outside_of_a_folder_is_removed_through_a_link(tmp_path, mlx):
    def only_model():
        (model,) = Scanner().scan_folders([Folder("directory", tmp_path / "models")])
        return model

    kept = shutil.copytree(mlx, tmp_path / "elsewhere" / "org" / "tiny")
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceInvalid, match="behind a link"):
        remove(only_model())
    link.unlink()
    link.symlink_to(kept)
    remove(only_model())
    assert not link.is_symlink()
    assert {file.name for file in kept.iterdir()} == {file.name for file in mlx.iterdir()}
    shutil.copytree(mlx, tmp_path / "models" / "own")
    remove(only_model())
    shutil.copytree(mlx, tmp_path / "models", dirs_exist_ok=True)
    remove(only_model())
    assert not list((tmp_path / "models").glob("*"))
