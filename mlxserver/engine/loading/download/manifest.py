"""Manifest of a repository: the files of one commit with their sizes and digests, and where the cache has them.

Layout of the cache: models--ORG--NAME/{blobs/DIGEST, snapshots/COMMIT/FILE, refs/REVISION}; a file of a snapshot is a
link to its blob. Source: huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url

WHOLE = (".safetensors", ".gguf")  # what makes a snapshot a model: linked last
COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")  # it becomes the name of a folder


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit. size: bytes. digest: SHA-256 of a file in LFS, git's SHA-1 of any other, in hex."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Files of one commit of a repository, and their places in a cache."""

    repository: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    cache: Path

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache."""
        return self.cache / f"models--{self.repository.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The directory with the commit's files."""
        return self.folder / "snapshots" / self.commit

    @property
    def missing(self) -> list[RemoteFile]:
        """The files that the cache does not have."""
        return [file for file in self.files if not self.has(file)]

    @property
    def missing_bytes(self) -> int:
        """Bytes that are to be downloaded."""
        return sum(file.size - self.bytes_on_disk(file) for file in self.missing)

    def has(self, file: RemoteFile) -> bool:
        """Whether the cache has a file, from here or from another program that shares the cache."""
        return self.blob(file).is_file() or self.link(file).is_file()

    def blob(self, file: RemoteFile) -> Path:
        """Where a file's content is kept."""
        return self.folder / "blobs" / file.digest

    def part(self, file: RemoteFile) -> Path:
        """Where the beginning of a file is kept until it is complete."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def link(self, file: RemoteFile) -> Path:
        """A file's place in the snapshot."""
        return self.snapshot / file.name

    def lock(self, file: RemoteFile) -> Path:
        """The lock of a file's download, which is the one of huggingface_hub."""
        return self.cache / ".locks" / self.folder.name / f"{file.digest}.lock"

    def bytes_on_disk(self, file: RemoteFile) -> int:
        """Bytes of a file that the cache has, complete or not."""
        if self.has(file):
            return file.size
        with suppress(OSError):
            return min(self.part(file).stat().st_size, file.size)
        return 0

    def named(self, *patterns: str) -> Manifest:
        """The manifest with the files that fit one of the patterns."""
        files = (file for file in self.files if any(fnmatch(file.name, each) for each in patterns))
        return replace(self, files=tuple(files))

    def find(self, name: str) -> RemoteFile | None:
        """The file with this name."""
        return next((file for file in self.files if file.name == name), None)

    def link_all(self) -> None:
        """Make the snapshot, weights last, and have the revision name it. Raises OSError."""
        for file in sorted(self.files, key=lambda file: file.name.endswith(WHOLE)):
            _link(self.link(file), self.blob(file))
        if self.revision != self.commit:
            ref = self.folder / "refs" / self.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit)


def read_manifest(repository: str, revision: str | None) -> Manifest:
    """The manifest of a repository's revision; None is the main branch.

    Raises:
        ValueError for a commit that is none, and what huggingface_hub raises
    """
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=timeout)
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"the hub names {commit[:100]!r} as the commit of {repository}")
    siblings: Sequence[object] = info.siblings or ()
    files = tuple(_remote_files(repository, commit, siblings))
    return Manifest(repository, revision or "main", commit, files, Path(constants.HF_HUB_CACHE))


def _remote_files(repository: str, commit: str, siblings: Iterable[object]) -> Iterable[RemoteFile]:
    for each in siblings:
        name = str(getattr(each, "rfilename", ""))
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            continue  # it would leave the snapshot
        lfs, size = getattr(each, "lfs", None), getattr(each, "size", None)
        digest = lfs.sha256 if lfs else getattr(each, "blob_id", None)
        if digest is None or size is None:  # a mirror that lists names alone
            stated = get_hf_file_metadata(hf_hub_url(repository, name, revision=commit))
            digest, size = stated.etag, stated.size
        yield RemoteFile(name, max(0, int(size or 0)), Path(str(digest)).name)


def _link(link: Path, blob: Path) -> None:
    if link.exists():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        link.unlink()  # it leads nowhere
    with suppress(FileExistsError):  # another download of the same was faster
        link.symlink_to(os.path.relpath(blob, link.parent))
