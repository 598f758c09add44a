"""Folders of models as programs keep them, made of models that are given: of the hub's cache, LM Studio's, Ollama's."""

import hashlib
import json
import shutil

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_hub(cache, name, model):
    """Put a model's files into a hub cache: blobs, and a snapshot of links to them. Gives the repository's folder."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir() if model.is_dir() else [model]:
        blob = root / "blobs" / digest_of(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return root


def in_lm_studio(models, name, model):
    """Put a model under publisher/name: a directory, or a GGUF file in one."""
    target = models / name
    if model.is_dir():
        return shutil.copytree(model, target)
    target.mkdir(parents=True, exist_ok=True)
    return shutil.copy(model, target / f"{target.name}.gguf")


def in_ollama(models, name, tag, gguf, *, host="registry.ollama.ai", namespace="library", kinds=("model",)):
    """Put a GGUF file into Ollama's blobs, with a manifest. Gives the manifest."""
    digest = digest_of(gguf)
    (models / "blobs").mkdir(parents=True, exist_ok=True)
    shutil.copy(gguf, models / "blobs" / f"sha256-{digest}")
    manifest = models / "manifests" / host / namespace / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"} for kind in kinds]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest
