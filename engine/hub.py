"""Models from the Hugging Face hub, kept where huggingface_hub keeps them.

Rule 1: a complete snapshot on this machine is used when the hub can't be reached.
Rule 2: nothing is printed; progress is reported in bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS
from tqdm.auto import tqdm

from engine.errors import SourceInvalid

FILES = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != "*.py"]  # remote code is never run
REACH = "could not be fetched from the Hugging Face hub"


def snapshot(source: str, repository: str, revision: str | None, progress: Callable[[str, int, int], None]) -> Path:
    """The local directory of a repository's model files, downloaded if needed. Raises SourceInvalid."""
    try:
        directory = snapshot_download(
            repository, revision=revision, allow_patterns=FILES, tqdm_class=_byte_reporter(progress)
        )
    except errors.GatedRepoError:
        raise SourceInvalid(source, "access is restricted: accept its terms on the hub and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise SourceInvalid(source, f"the repository has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise SourceInvalid(source, "no such repository on the hub (or a private one: set HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError:
        raise SourceInvalid(source, f"{REACH}; expected a network connection, or a copy downloaded before") from None
    except Exception as error:  # the hub's and the transport's errors are of many kinds
        raise SourceInvalid(source, f"{REACH}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not Path(directory, "config.json").is_file():
        raise SourceInvalid(source, "the repository has no config.json; expected a model for mlx-lm")
    return Path(directory)


def _byte_reporter(progress: Callable[[str, int, int], None]) -> type[Any]:
    """A progress bar that draws nothing and reports the bytes written to disk."""

    class ByteReporter(tqdm):  # type: ignore[misc,type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            with Path(os.devnull).open("w") as nowhere:
                super().__init__(*args, **{**options, "file": nowhere, "leave": False})

        def display(self, *args: Any, **options: Any) -> None:
            if self.unit == "B" and str(self.desc).startswith("Reconstruct"):
                progress("downloading", int(self.n), int(self.total or 0))

        def close(self) -> None:
            self.disable = True

    return ByteReporter
