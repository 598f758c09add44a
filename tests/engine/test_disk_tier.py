"""The prefix cache on disk: what is found after a restart, and what never is."""

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace

from mlxserver.engine.mlx import mx

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache

from mlxserver.engine.kv_cache import cache_files, caches, checkpoints, disk_files, disk_reader
from mlxserver.engine.kv_cache.disk_index import FileName
from mlxserver.engine.kv_cache.disk_reader import Blocks
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, PrefixCache
from mlxserver.engine.kv_cache.ram_tier import RamTier
from mlxserver.engine.platform import device, pinned_memory
from mlxserver.engine.scheduler.scheduler import Scheduler
from tests.support.architectures import random_model
from tests.support.batch_driver import Driver, prompt, sequence
from tests.support.prefixes import Asked

IDENTITY = ModelIdentity("files")
KINDS = ["llama", "mamba", "olmo_hybrid", "baichuan_m1", "gemma3_text", "kimi_k25"]
SYSTEM, QUESTION = prompt(300, seed=1), prompt(50, seed=2)
PROMPT = SYSTEM + QUESTION


class Process(Asked):
    """What one server has: a model, and its prefixes in memory and in a folder."""

    def __init__(self, model, folder, identity=IDENTITY, max_bytes=1 << 30, alone=None):
        self.disk = DiskTier(folder, max_bytes)
        self.cache = PrefixCache(RamTier(), self.disk)
        prefixes = self.cache.open(identity, 1 << 30, "model")
        prefixes.is_warm = True
        super().__init__(model, prefixes, alone=alone)

    def end(self):
        self.disk.flush()
        self.disk.close()


class HostBuffer:
    """A buffer as a CUDA device has it in page-locked memory."""

    def __init__(self, nbytes=1 << 20):
        self.memory = memoryview(bytearray(nbytes))
        self.copies = 0

    def upload(self, start, shape, dtype):
        self.copies += 1
        content = np.frombuffer(self.memory[start : start + math.prod(shape) * dtype.size], dtype=np.uint8)
        return mx.array(content).view(dtype).reshape(shape)

    def download(self, array, start):
        self.copies += 1
        self.memory[start : start + array.nbytes] = np.array(array.reshape(-1).view(mx.uint8)).tobytes()
        return mx.zeros(1)


@pytest.fixture
def buffer(monkeypatch):
    """The buffer of all threads."""
    buffer = HostBuffer(1 << 26)
    monkeypatch.setattr(pinned_memory, "borrowed", lambda: nullcontext(buffer))
    monkeypatch.setattr(disk_reader, "_READERS", 1)
    return buffer


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


@pytest.fixture
def filled(llama, tmp_path):
    """A folder with a conversation's prefix."""
    process = Process(llama, tmp_path)
    process.ask(PROMPT)
    process.end()
    assert files(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_prefixes_are_there_after_a_restart(name, tmp_path):
    model = random_model(name)
    before = Process(model, tmp_path)
    answer, _ = before.ask(PROMPT, (300, 345))
    before.end()
    is_plain = caches.is_plain(model)
    for tokens, common in (
        (PROMPT + answer + QUESTION, 357),
        (PROMPT, 349),
        (SYSTEM + prompt(40, seed=4), 300),
        (PROMPT[:345] + prompt(9, seed=5), 345),
    ):
        after = Process(model, tmp_path)
        cached = after.ask(tokens)[1]
        assert cached == common if not is_plain else common - 128 < cached <= common
        after.disk.close()


def test_prefixes_are_there_after_an_unload(llama, tmp_path):
    process = Process(llama, tmp_path)
    process.ask(PROMPT)
    process.disk.flush()
    process.prefixes.close()
    assert process.prefixes.nbytes == 0
    again = process.cache.open(IDENTITY, 1 << 30, "model")
    again.is_warm = True
    process.driver = Driver(Scheduler(llama, prefixes=again))
    assert process.ask((*PROMPT, 5, 6))[1] >= 256
    process.end()


def test_another_model_finds_nothing(llama, filled):
    for field in ("files", "adapter", "weights", "kv_format", "share"):
        other = Process(llama, filled, replace(IDENTITY, **{field: "another"}))
        assert other.ask(PROMPT)[1] == 0
        other.end()


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def damage_header(path):
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)


def write_foreign(path):
    path.write_bytes(b"something else" * 1000)


def write_future(path):
    content = bytearray(path.read_bytes())
    content[7] += 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_end, truncate, empty, damage_header, write_foreign, write_future])
@pytest.mark.parametrize("name", ["llama", "olmo_hybrid"])
def test_a_file_that_is_not_what_was_written_is_removed_and_not_served(name, damage, tmp_path, caplog):
    model = random_model(name)
    before = Process(model, tmp_path)
    before.ask(PROMPT, (300,))
    before.end()
    for path in files(tmp_path):
        damage(path)
    spoiled = {path: path.read_bytes() for path in files(tmp_path)}
    after = Process(model, tmp_path)
    assert after.ask(PROMPT, (300,))[1] == 0
    after.end()
    assert "damaged, and is removed" in caplog.text
    assert any(path.read_bytes() != content for path, content in spoiled.items() if path.exists())
    again = Process(model, tmp_path)
    assert again.ask(PROMPT, (300,))[1] in (0, 128, 256, 349)
    again.end()


@pytest.mark.parametrize("damage", [None, damage_end, truncate, empty, damage_header, write_foreign, write_future])
def test_files_go_through_page_locked_memory_where_there_is_some(llama, damage, tmp_path, buffer):
    before = Process(llama, tmp_path)
    before.ask(PROMPT)
    before.end()
    assert (written := buffer.copies)
    for path in files(tmp_path) if damage else ():
        damage(path)
    after = Process(llama, tmp_path)
    assert after.ask(PROMPT)[1] == (0 if damage else 256)
    assert damage or buffer.copies > written
    after.end()


def test_files_are_alike_whatever_they_were_written_through(tmp_path):
    model = random_model("olmo_hybrid")
    cache = caches.new_cache(model)
    model(mx.array([prompt(70)]), cache=cache)
    cache_files.write(tmp_path / "any.safetensors", cache)
    largest = max(stack.nbytes for stack in cache_files.read(tmp_path / "any.safetensors").stacks)
    buffers = [None, HostBuffer(), HostBuffer(largest), HostBuffer(largest - 1)]
    for n, buffer in enumerate(buffers):
        (tmp_path / f"{n}").mkdir()
        cache_files.write(tmp_path / f"{n}" / "one.safetensors", cache, buffer)
    expected = checkpoints.arrays_of(cache)
    for n in range(len(buffers)):
        for buffer in buffers:
            again = cache_files.restored(cache_files.read(tmp_path / f"{n}" / "one.safetensors", buffer))
            arrays = checkpoints.arrays_of(again)
            assert all(mx.array_equal(*pair) for pair in zip(arrays, expected, strict=True))
    assert buffers[1].copies
    assert buffers[2].copies
    assert not buffers[3].copies


def test_a_file_under_another_s_name_is_not_served(llama, filled):
    for path in files(filled):
        kind, start, end, _ = path.stem.split("-")
        path.rename(path.with_name(f"{kind}-{start}-{end}-{'0' * 32}.safetensors"))
    swapped = Process(llama, filled)
    assert swapped.ask(PROMPT)[1] == 0
    swapped.end()
    with pytest.raises(cache_files.CacheFileInvalid):
        cache_files.read(next(path for path in files(filled) if path.stem.endswith("-" + "0" * 32)))


def test_other_files_in_the_folder_are_left_alone(llama, filled):
    folder = files(filled)[0].parent
    others = [
        folder / name
        for name in ("notes.txt", "w-1.safetensors", "x-y-z-0.safetensors", "young.1-2-3.partial.safetensors")
    ]
    for path in others:
        path.write_text("mine")
    process = Process(llama, filled)
    assert process.ask(PROMPT)[1] == 256
    process.end()
    assert all(path.exists() for path in others)


def test_files_are_bounded_and_the_least_recently_used_go_first(llama, tmp_path):
    process = Process(llama, tmp_path)
    process.ask(PROMPT)
    process.disk.flush()
    size = process.disk.usage()[1]
    process.disk.files.max_bytes = 3 * size
    for seed in range(4):
        process.ask(prompt(350, seed=10 + seed))
        process.disk.flush()
        assert process.disk.usage()[1] <= 3 * size
    process.end()
    after = Process(llama, tmp_path, max_bytes=3 * size)
    assert after.ask(prompt(350, seed=13))[1] == 256
    assert after.ask(PROMPT)[1] == 0
    after.end()


def test_a_folder_that_can_not_be_written_is_logged_once_and_the_cache_stays_in_memory(llama, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    process = Process(llama, tmp_path / "file" / "folder")
    for _ in range(3):
        process.ask(PROMPT)
        process.disk.flush()
    assert process.ask(PROMPT)[1] == 349
    process.end()
    assert caplog.text.count("can't be written") == 1


SERVER = """
import resource, sys
from pathlib import Path
from tests.engine.test_disk_tier import PROMPT, Process
from tests.support.architectures import random_model
from tests.support.batch_driver import prompt
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
process = Process(random_model("llama"), Path(sys.argv[1]))
if sys.argv[2] == "endless":
    seed = 0
    while True:
        process.ask(prompt(600, seed=seed))
        print(seed, flush=True)
        seed += 1
process.ask(PROMPT)
process.disk.flush()
print(process.ask(PROMPT)[1], flush=True)
process.end()
"""


def started(folder, how):
    return subprocess.Popen([sys.executable, "-c", SERVER, str(folder), how], stdout=subprocess.PIPE, text=True)


def test_a_full_disk_costs_the_files_and_nothing_else(tmp_path):
    with started(tmp_path, "full") as process:
        assert process.stdout.read() == "349\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_killed_process_has_written_is_used_and_nothing_incomplete(llama, tmp_path):
    with started(tmp_path, "endless") as first, started(tmp_path, "endless") as second:
        for process in (first, second):
            while int(process.stdout.readline()) < 3:
                pass
        first.send_signal(signal.SIGKILL)
        process = Process(llama, tmp_path)  # beside the other one
        assert process.ask(prompt(600, seed=0))[1] >= 512
        second.kill()
    for path in files(tmp_path):
        cache_files.read(path)
    process.end()


def test_what_is_not_finite_is_not_written(tmp_path):
    model = random_model("llama")
    model.model.embed_tokens.weight[299] = mx.nan
    process = Process(model, tmp_path)
    process.driver.add(sequence(0, (*PROMPT, 299)))
    process.driver.finish()
    process.end()
    assert files(tmp_path) == []


def test_files_that_were_never_completed_are_removed_in_time(llama, filled):
    left = files(filled)[0].with_suffix(".1-2-3.partial.safetensors")
    left.write_bytes(b"half")
    old = time.time() - 3600
    os.utime(left, (old, old))
    Process(llama, filled).end()
    assert not left.exists()


def test_files_of_the_former_format_are_removed(llama, filled):
    former = filled / ("0" * 32)
    former.mkdir()
    (former / f"w-0-128-{'a' * 32}.kv").write_bytes(b"mlxkvpc\x01")
    (filled / "mine.kv").write_text("mine")
    process = Process(llama, filled)
    process.disk.flush()
    assert process.ask(PROMPT)[1] == 256
    process.end()
    assert not former.exists()
    assert (filled / "mine.kv").exists()


class WaitingTier(DiskTier):
    """A disk whose answers come when a test sets them."""

    def __init__(self, folder, max_bytes):
        super().__init__(folder, max_bytes)
        self.reads = []

    def restore(self, model, tokens, beyond, keep):
        self.reads.append(Future())
        return self.reads[-1]


def test_a_prompt_whose_prefix_is_being_read_delays_no_other_one_and_can_be_removed(llama, tmp_path):
    disk = WaitingTier(tmp_path, 1 << 30)
    prefixes = PrefixCache(RamTier(), disk).open(IDENTITY, 1 << 30)
    prefixes.is_warm = True
    driver = Driver(Scheduler(llama, prefixes=prefixes))
    driver.add(*(sequence(id, prompt(40, seed=id)) for id in range(4)))
    driver.step()
    assert driver.scheduler.waiting() == {0, 1, 2, 3}
    disk.reads[2].set_result(None)
    driver.until_generated(2, 8)
    assert driver.scheduler.waiting() == {0, 1, 3}
    driver.scheduler.remove([1])
    disk.reads[0].set_result(None)
    disk.reads[3].set_result(None)
    tokens = driver.finish()
    assert [len(tokens[id]) for id in range(4)] == [8, 0, 8, 8]
    disk.close()


def test_what_is_restored_is_not_in_memory_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_reader, "_READERS", 1)
    monkeypatch.setattr(disk_reader, "_AHEAD", 2)
    tokens, layer, found = np.arange(8192), KVCache(), []
    layer.keys = layer.values = mx.random.normal((1, 2, len(tokens), 256))
    layer.offset, nbytes = len(tokens), layer.keys.nbytes * 2
    disk = DiskTier(tmp_path, 1 << 30)
    disk.store(IDENTITY, tokens, [layer], None)
    disk.flush()
    del layer
    mx.clear_cache()
    before = device.active_bytes()
    mx.reset_peak_memory()
    disk.restore(IDENTITY, np.arange(8193), 0, found.append).result()
    assert len(found[0].tokens) == len(tokens)
    assert mx.get_peak_memory() - before < 1.5 * nbytes
    disk.close()


@pytest.mark.parametrize("length", [1, 100, 128, 129, 1000])
def test_layers_are_put_together_from_blocks_as_they_were(length, tmp_path):
    """Keys of another type and shape than values, in more layers than a stack has arrays."""
    layers = []
    for n in range(11):
        layer = KVCache()
        layer.keys = mx.random.normal((1, 2, length + 7, 8), key=mx.random.key(n)).astype(mx.bfloat16)
        layer.values = mx.random.normal((1, 2, length + 7, 5), key=mx.random.key(n)).astype(mx.float16)
        layer.offset = length
        layers.append(layer)
    blocks = Blocks(length)
    for start in range(0, length, 128):
        end = min(start + 128, length)
        path = tmp_path / f"{start}.safetensors"
        cache_files.write(path, checkpoints.cut_out(layers, start, end))
        blocks.put(cache_files.read(path), FileName("w", start, end, ""))
    for layer, again in zip(layers, blocks.part(), strict=True):
        assert (again.offset, again.keys.dtype, again.values.dtype) == (length, mx.bfloat16, mx.float16)
        assert mx.array_equal(again.keys, layer.keys[:, :, :length])
        assert mx.array_equal(again.values, layer.values[:, :, :length])


@pytest.mark.parametrize("place", [0, 4095, 4096, -1])
def test_any_damage_to_the_content_is_found(place, tmp_path):
    """The content of a file, behind its header, byte by byte; so are rows of the checksum that are swapped."""
    layer = ArraysCache(1)
    layer.cache = [mx.random.normal((4, 1024), key=mx.random.key(0))]
    path = tmp_path / "c.safetensors"
    cache_files.write(path, [layer])
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content[start:])
    damaged[place] ^= 16
    swapped = content[start + 4096 : start + 8192] + content[start : start + 4096] + content[start + 8192 :]
    cache_files.read(path)
    for body in (damaged, swapped, bytes(len(damaged))):
        path.write_bytes(content[:start] + body)
        with pytest.raises(cache_files.CacheFileInvalid):
            cache_files.read(path)


def test_usage_has_entries_bytes_and_hits_and_clear_removes_all(llama, filled):
    process = Process(llama, filled)
    process.ask(PROMPT)
    process.ask(PROMPT)
    process.disk.flush()
    ram, disk, total = process.cache.usage()
    assert (ram.tier, ram.model, ram.entries, ram.hits) == ("ram", "model", 1, 2)
    assert (disk.tier, disk.model, disk.entries, disk.hits) == ("disk", "model", len(files(filled)), 1)
    assert disk.bytes == total.bytes == sum(path.stat().st_size for path in files(filled))
    process.cache.clear()
    assert {(usage.entries, usage.bytes) for usage in process.cache.usage()} == {(0, 0)}
    assert process.ask(PROMPT)[1] == 0
    process.end()


def test_a_part_comes_back_as_it_was(tmp_path):
    model = random_model("baichuan_m1")
    cache = caches.new_cache(model)
    model(mx.array([prompt(70)]), cache=cache)
    cache_files.write(tmp_path / "one.safetensors", cache)
    again = cache_files.restored(cache_files.read(tmp_path / "one.safetensors"))
    step = mx.array([[5]])
    assert mx.array_equal(model(step, cache=again), model(step, cache=cache))


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["append", "edit", "branch", "cancel", "evict", "restart"]),
        st.integers(0, 400),
        st.integers(1, 60),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("name", ["llama", "olmo_hybrid", "gemma3_text"])
def test_no_sequence_of_edits_changes_an_answer(name, tmp_path_factory):
    """Every answer is compared with that of a scheduler without any cache, in Process.ask()."""
    model, alone = random_model(name), {}

    @settings(max_examples=12)
    @given(EDITS)
    def check(edits):
        folder = tmp_path_factory.mktemp("cache")
        process, histories = Process(model, folder, alone=alone), [prompt(130, seed=9)]
        for n, (kind, place, length) in enumerate(edits):
            history, new = histories[-1], prompt(length, seed=n)
            place = min(place, len(history) - 1)
            match kind:
                case "append":
                    histories.append(history + process.ask(history, (place,))[0] + new)
                case "edit":
                    histories.append(history[:place] + new + history[place + length :])
                case "branch":
                    histories.append(histories[place % len(histories)] + new)
                case "cancel":
                    process.driver.add(replace(sequence(10_000 + n, history), boundaries=(place,)))
                    process.driver.step()
                    process.driver.scheduler.remove([10_000 + n])
                case "evict":
                    process.prefixes.shrink(place * 1000)
                case "restart":
                    process.end()
                    process = Process(model, folder, alone=alone)
            process.ask(histories[-1], (place,))
        process.end()

    check()


def test_files_of_other_processes_are_found_though_this_one_writes(llama, tmp_path, monkeypatch):
    """A process that writes adds its own files to what it knows of the folder, and lists it only at times."""
    monkeypatch.setattr(disk_files, "_TRUSTED_SECONDS", 0.2)
    one, other = Process(llama, tmp_path), Process(llama, tmp_path)
    for seed in range(3):
        one.ask(prompt(350, seed=40 + seed))
        other.ask(prompt(350, seed=50 + seed))
        one.disk.flush()
        other.disk.flush()
    time.sleep(0.3)  # the account is trusted for so long
    one.prefixes.shrink(0)
    assert [one.ask(prompt(350, seed=seed))[1] for seed in (40, 42, 50, 52)] == [256] * 4
    one.end()
    other.end()


def test_a_prompt_that_is_in_memory_waits_for_no_list_of_a_folder_that_is_being_written(llama, tmp_path):
    process = Process(llama, tmp_path)
    process.ask(PROMPT)
    process.disk.flush()
    (files(tmp_path)[0].parent / "of-the-next-turn.partial").touch()
    assert process.prefixes.restore(PROMPT) is None
    assert process.prefixes.restore(prompt(350, seed=3)) is None
    process.end()


def test_the_bytes_of_all_processes_are_bounded(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_files, "_TRUSTED_SECONDS", 0.0)
    one, other = Process(llama, tmp_path), Process(llama, tmp_path)
    one.ask(PROMPT)
    one.disk.flush()
    size = one.disk.usage()[1]
    one.disk.files.max_bytes = other.disk.files.max_bytes = 2 * size
    for seed in range(3):
        for process in (one, other):
            process.ask(prompt(350, seed=60 + seed + 10 * (process is other)))
            process.disk.flush()
            assert process.disk.usage()[1] <= 2 * size
    one.end()
    other.end()
