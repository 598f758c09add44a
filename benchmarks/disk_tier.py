"""Disk tier of the prefix cache without a model: seconds to write a prefix, and of each part of restoring it.

python -m benchmarks.disk_tier [--tokens 16384] [--layers 8] [--kv-heads 8] [--dim 128] [--work DIR] [--out FILE]

Rule: files are in the page cache of the system; the rate of the disk is not measured here.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mlxserver.engine.mlx import mx

import numpy as np
from mlx_lm.models.cache import KVCache

from mlxserver.engine.kv_cache import cache_files, caches, checkpoints
from mlxserver.engine.kv_cache.caches import Cache
from mlxserver.engine.kv_cache.disk_files import DiskFiles
from mlxserver.engine.kv_cache.disk_index import FileName
from mlxserver.engine.kv_cache.disk_reader import Blocks
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.kv_cache.slots import grow
from mlxserver.engine.platform import pinned_memory, streams

IDENTITY = ModelIdentity("benchmark")
ROOM = 1 << 40  # bytes: no bound is met
THREADS = (1, 2, 4, 8)


class Record:
    """Seconds by name, in the order of their measurement; those of one name are several runs."""

    def __init__(self, path: Path | None) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._path = path

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Measure the block."""
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(round(time.perf_counter() - start, 4))
        print(f"{name:60} {self.seconds[name][-1]:9.4f} s", flush=True)
        if self._path:
            self._path.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")


def make_cache(options: argparse.Namespace) -> Cache:
    """Keys and values of a prompt, evaluated."""
    cache: Cache = []
    for number in range(options.layers):
        layer = KVCache()
        shape = (1, options.kv_heads, options.tokens, options.dim)
        layer.keys = mx.random.normal(shape, key=mx.random.key(number)).astype(mx.bfloat16)
        layer.values = layer.keys + 1
        layer.offset = options.tokens
        mx.eval(layer.keys, layer.values)
        cache.append(layer)
    return cache


def host_read(paths: Sequence[Path], threads: int) -> None:
    """Read files into host memory that exists already."""

    def read(own: Sequence[Path]) -> None:
        buffer = bytearray(max(path.stat().st_size for path in paths))
        for path in own:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    share(paths, threads, read)


def device_read(paths: Sequence[Path], threads: int, *, is_pinned: bool, is_checked: bool) -> None:
    """Read files into the device's memory, and keep what they have until all are read."""

    def read(own: Sequence[Path]) -> None:
        with streams.thread_stream(), pinned_memory.borrowed() if is_pinned else nullcontext() as buffer:
            for path in own:
                if is_checked:
                    kept.append(cache_files.read(path, buffer))
                else:
                    arrays = list(mx.load(str(path)).values())  # type: ignore[union-attr]
                    mx.eval(arrays)
                    kept.append(arrays)

    kept: list[object] = []
    share(paths, threads, read)


def share(paths: Sequence[Path], threads: int, read: Callable[[Sequence[Path]], None]) -> None:
    """Give each thread its share of the files. Raises what it raises."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [paths[number::threads] for number in range(threads)]))


def put(parts: Sequence[tuple[FileName, cache_files.StoredPart]], tokens: int, at_once: int) -> Cache:
    """Put blocks together, so many per evaluation."""
    blocks = Blocks(tokens)
    for number, (name, part) in enumerate(parts):
        blocks.put(part, name)
        if number % at_once == at_once - 1:
            blocks.evaluate()
    blocks.evaluate()
    return blocks.part()


def insert(cache: Cache, capacity: int) -> None:
    """What a chunk of prefill does to a prefix first: copy it into a slot."""
    for layer in cache:
        mx.async_eval(grow(layer.keys, 1, capacity), grow(layer.values, 1, capacity))  # type: ignore[no-untyped-call]
    mx.synchronize()


def measure(options: argparse.Namespace, folder: Path, record: Record) -> None:
    """Measure everything."""
    tokens = np.arange(options.tokens, dtype=np.int64)
    with record.timing("first look for page-locked memory"):
        print("page-locked memory:", pinned_memory.is_available())
    with record.timing("make a buffer"), pinned_memory.borrowed():
        pass
    cache = make_cache(options)
    size = caches.cache_bytes(cache)
    disk = DiskTier(folder, ROOM)
    with record.timing("write"):
        disk.store(IDENTITY, tokens, checkpoints.lasting_part(cache), None)
        disk.flush()
    disk.close()
    del cache
    files = DiskFiles(folder, ROOM)
    with record.timing("list"):
        index = files.refreshed_index(IDENTITY)
    asked = np.append(tokens, [1])
    with record.timing("find"):
        plan = index.find(asked)
    paths = [files.folder_of(IDENTITY) / str(name) for name in plan.names]
    print(f"{len(paths)} files of {size / 1e9:.2f} GB, {plan.length} tokens")
    for threads in [count for count in THREADS if count <= options.threads]:
        for _ in range(2):
            with record.timing(f"read to the host, {threads} threads"):
                host_read(paths, threads)
            for name, is_pinned, is_checked in (
                ("MLX", False, False),
                ("MLX, checked", False, True),
                ("page-locked, checked", True, True),
            ):
                with record.timing(f"read to the device, {name}, {threads} threads"):
                    device_read(paths, threads, is_pinned=is_pinned, is_checked=is_checked)
    parts = [(name, cache_files.read(path)) for name, path in zip(plan.names, paths, strict=True)]
    for at_once in (1, 4, 16):
        for _ in range(2):
            with record.timing(f"put together, {at_once} files per evaluation"):
                put(parts, plan.length, at_once)
    del parts
    restore(options, folder, asked, record)


def restore(options: argparse.Namespace, folder: Path, asked: np.ndarray, record: Record) -> None:
    """Restore the prefix as an engine does, each time into an empty tier of a process that has just started."""
    for _ in range(options.runs):
        prefix_cache = PrefixCache(RamTier(), DiskTier(folder, ROOM))
        prefixes = prefix_cache.open(IDENTITY, ROOM)
        prefixes.is_warm = True
        asked_for = asked.tolist()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with record.timing("restore: find, read, put, keep"):
            future = prefixes.restore(asked_for)
            assert future
            future.result()
        print(f"peak memory: {(mx.get_peak_memory() - before) / 1e9:.2f} GB")
        with record.timing("fetch"):
            cache, length = prefixes.fetch(asked_for)
        assert cache
        assert length == len(asked) - 1
        for _ in range(2):
            with record.timing("insert"):
                insert(cache, options.tokens + 2048)
        del cache
        prefixes.close()
        prefix_cache.disk.close()  # type: ignore[union-attr]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk_tier", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=16_384)
    add("--layers", type=int, default=8)
    add("--kv-heads", type=int, default=8)
    add("--dim", type=int, default=128)
    add("--threads", type=int, default=8, help="most threads that read")
    add("--runs", type=int, default=3, help="of restoring")
    add("--work", type=Path, metavar="DIR", help="where files are made, and removed")
    add("--out", type=Path, metavar="FILE", help="JSON file of the seconds")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)  # why page-locked memory is not used, and what a restore took
    folder = Path(tempfile.mkdtemp(prefix="disk-tier-", dir=options.work))
    try:
        measure(options, folder, Record(options.out))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
