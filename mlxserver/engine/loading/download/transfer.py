"""Transfer of one file from the hub: what is on disk already is not fetched again.

Invariants
1. A file gets its name once its digest is right; until then it ends in .incomplete, and so it stays when the process is
   killed.
2. One process at a time fetches a file: the lock is the one of huggingface_hub, and ends with its process.
3. A server that fails, breaks off or asks to wait is asked again, unless it fails several times without a byte between.
4. No more bytes are written than the file is listed with, whatever the server sends.
5. No answer is asked for that is longer than LONGEST_ANSWER: content delivery networks refuse longer ones.
"""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, httpx

from mlxserver.engine.loading.download.manifest import Manifest, RemoteFile

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
LONGEST_DELAY = 300.0  # seconds that are waited at most, whatever a server asks for
BUSY = (408, 429, 500, 502, 503, 504)  # statuses after which it is asked again
POLL = 0.5  # seconds between two looks at a lock
SHA1_LENGTH = 40  # hex digits
LONGEST_ANSWER = 20 * 10**9  # bytes; the hub's own client refuses files of more than 50 GB over HTTP
DIGESTED = 64 << 20  # bytes of a file between two looks at whether the download was stopped

Pause = Callable[[str, float], None]  # waits so many seconds for a reason, and raises if the download was stopped


class DigestWrong(Exception):
    """What the hub sent is not the file that it lists, twice."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} arrived with a wrong digest twice; it was not kept")


class Busy(Exception):
    """The server asks to come back later. seconds: when, if it says so."""

    def __init__(self, status: int, seconds: float | None) -> None:
        super().__init__(f"the hub answered with status {status}")
        self.seconds = seconds


class Stopped(Exception):
    """The download was stopped."""


def fetch(manifest: Manifest, file: RemoteFile, pause: Pause) -> None:
    """Bring a file into the cache. Blocks. Raises DigestWrong, Stopped, OSError, and what huggingface_hub raises."""
    with _locked(manifest.lock(file), pause):
        if manifest.has(file):
            return
        part = manifest.part(file)
        part.parent.mkdir(parents=True, exist_ok=True)
        checking = partial(pause, "the digest of what has arrived is being checked", 0)
        for _ in range(2):
            _complete(hf_hub_url(manifest.repository, file.name, revision=manifest.commit), part, file.size, pause)
            if digest_of(part, file.digest, checking) == file.digest:
                part.replace(manifest.blob(file))
                return
            part.unlink()
        raise DigestWrong(file.name)


def digest_of(path: Path, like: str, between: Callable[[], None]) -> str:
    """The digest of a file in hex: git's of a blob if the other one has its length, or else SHA-256.

    between: called between two parts of a long file, which takes minutes.
    """
    is_git = len(like) == SHA1_LENGTH
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if is_git else hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(DIGESTED):
            digest.update(data)
            if len(data) == DIGESTED:
                between()
    return digest.hexdigest()


def asked_delay(response: Any) -> float | None:
    """Seconds after which a server wants to be asked again; None if it states none."""
    try:
        return max(float(response.headers["Retry-After"]), 0.0)
    except (KeyError, ValueError):  # none, or a date
        return None


def _complete(url: str, part: Path, size: int, pause: Pause) -> None:
    """Fetch what is missing of a file."""
    failures = 0
    while (held := _held(part, size)) < size or not part.exists():
        try:
            _receive(url, part, held, size, pause)
        except (Busy, httpx.TransportError) as error:
            failures = failures + 1 if _held(part, size) <= held else 0
            if failures > len(DELAYS):
                raise
            _wait(error, failures, pause)


def _wait(error: Exception, failures: int, pause: Pause) -> None:
    asked = error.seconds if isinstance(error, Busy) else None
    seconds = DELAYS[max(failures - 1, 0)] * random.uniform(0.75, 1.25) if asked is None else min(asked, LONGEST_DELAY)
    reason = str(error) if isinstance(error, Busy) else "the connection to the hub was lost"
    pause(f"{reason}; next try in {seconds:.0f} s", seconds)


def _held(part: Path, size: int) -> int:
    """Bytes of a file that are there. More than it has are those of something else, and are dropped."""
    with suppress(FileNotFoundError):
        if (held := part.stat().st_size) <= size:
            return held
        part.unlink()
    return 0


def _receive(url: str, part: Path, held: int, size: int, pause: Pause) -> None:
    """Append what the server sends behind the first `held` bytes, up to `size`, or as much as one answer may have.

    Raises TransportError if it is less.
    """
    end = min(size, held + LONGEST_ANSWER)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if held or end < size:
        headers["Range"] = f"bytes={held}-{end - 1 if end < size else ''}"
    timeout = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        _check(response)
        if not _continues(response, held):
            part.write_bytes(b"")
            held, end = 0, size
        with part.open("ab", buffering=0) as file:
            for received in response.iter_raw():
                _write(file, received[: end - held])
                held += len(received)
                pause("", 0)
                if held > end:
                    return  # the digest shows whether what came first is the file
    if held < end:
        raise httpx.RemoteProtocolError(f"{end - held} bytes of the file were not sent")


def _check(response: Any) -> None:
    if response.status_code in BUSY:
        raise Busy(response.status_code, asked_delay(response))
    if response.is_error:
        response.read()
    hf_raise_for_status(response)


def _continues(response: Any, held: int) -> bool:
    """Whether an answer goes on where the file ends; a server without ranges sends all of it."""
    content_range = str(response.headers.get("Content-Range", ""))
    return bool(response.status_code == 206 and content_range.startswith(f"bytes {held}-"))


def _write(file: Any, data: bytes) -> None:
    """Write everything: a file without a buffer may take a part. Raises OSError."""
    view = memoryview(data)
    while view:
        if not (written := file.write(view)):
            raise OSError(errno.ENOSPC, "No space left on device")
        view = view[written:]


@contextmanager
def _locked(path: Path, pause: Pause) -> Iterator[None]:
    """Hold a lock; another process may have it for as long as its download takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(path, timeout=POLL))
                break
            except Timeout:
                pause("another download of the same file is under way", 0)
        yield
