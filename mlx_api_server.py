"""The server's process: default models, settings, wiring, start and end. Reads from main() downwards.

The dialects of api/ translate between the wire and the engine; server/ is HTTP.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" or sys.argv[0].endswith("mlx-server"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among the imports below ends it without a traceback
if __name__ == "__main__":
    from mlxserver.__main__ import run_command

    run_command()  # and what is wrong with a command line needs nothing of the imports below

import asyncio
import errno
import gc
import json
import logging
import os
import socket
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from mlxserver import __version__
from mlxserver.config import load
from mlxserver.config.errors import ConfigInvalid, ModelInvalid
from mlxserver.config.http import is_loopback
from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.config.written import as_toml
from mlxserver.engine.distributed import follower, launch
from mlxserver.engine.distributed.launch import RanksDiffer
from mlxserver.engine.distributed.leader import Leader
from mlxserver.engine.distributed.link import LinkLost
from mlxserver.engine.errors import EngineError
from mlxserver.engine.kv_cache.disk_tier import DiskTier
from mlxserver.engine.kv_pool import KVPool
from mlxserver.engine.loading import sharding, sources
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.estimate import Estimate, estimate
from mlxserver.engine.loading.kept_choices import CHOICES, KeptChoices
from mlxserver.engine.loading.library.scan import Scanner
from mlxserver.engine.loading.progress import Loading
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import device, streams
from mlxserver.engine.platform.folders import cache_directory
from mlxserver.engine.runners.builder import Builder
from mlxserver.engine.runners.kept_checks import KeptChecks
from mlxserver.engine.worker.engine import Engine
from mlxserver.engine.worker.thread_pool import ThreadPool
from mlxserver.manager.loading import StartEngine
from mlxserver.manager.reload import Reload
from mlxserver.manager.watchdog import watch
from mlxserver.server import logs
from mlxserver.server.greeting import greeting
from mlxserver.server.port_holder import PortTaken, find_holder
from mlxserver.server.uvicorn_server import Server
from model_manager import ModelManager

log = logging.getLogger("server")

ADAPTERS = Path(__file__).parent / "mlxserver" / "adapters"

DEFAULT_MODELS = (
    # Its makers recommend temperature 0.2 and top_p 0.9 (loading/sources.py). In four bits sampling then often takes a
    # wrong first word, so this one is greedy; and it often repeats itself without end, which the penalty ends.
    ModelSpec(
        "smollm2",
        "embedded:smollm2",
        type="instruction",
        preload=True,
        defaults={"temperature": 0.0, "frequency_penalty": 0.3},
    ),
    ModelSpec(
        "smollm2-think", "embedded:smollm2", type="thinking", adapter=str(ADAPTERS / "smollm2-think"), preload=True
    ),
    ModelSpec("minilm", "embedded:minilm", kind="embedding"),
    ModelSpec("qwq", "mlx-community/QwQ-32B-4bit", type="thinking"),
    ModelSpec("mistral", "mlx-community/Mistral-7B-Instruct-v0.3-4bit", type="instruction"),
)

# Seconds that a thread computes in Python while another waits for its turn. A decode step on a GPU takes 2 to 4 ms, and
# an engine thread would wait for up to 5 behind the events of the step before.
SWITCH_INTERVAL = 0.0005
THREADS_PATIENCE = 5.0  # seconds that idle threads get to end


def main() -> int:
    """The command line. 0: stopped by a signal; 2: wrong usage; 1: the address or another rank can't be had.

    `serve`, which may be left out, is the server; `config` prints its settings. The other commands have been run before
    this, and the flags checked (mlxserver/__main__.py).

    A signal before the server is ready, and a second one while it stops, end the process as signals do (130, 143).
    """
    name, arguments = sys.argv[1:2], sys.argv[1:]
    try:
        if name == ["config"]:
            print_settings(arguments[1:])
            return 0
        run(arguments[1:] if name == ["serve"] else arguments)
    except (ConfigInvalid, RanksDiffer) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LinkLost as error:
        print(f"error: another rank is lost: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def print_settings(arguments: list[str]) -> None:
    """Print the settings as a TOML file, or with --json as an object. Raises ConfigInvalid."""
    text = as_toml(read_settings([each for each in arguments if each != "--json"]))
    endless = {"inf": None}  # JSON has no such number
    values = tomllib.loads(text, parse_float=lambda number: endless.get(number, float(number)))
    print(json.dumps(values, indent=2) if "--json" in arguments else text.removesuffix("\n"))


def run(arguments: list[str]) -> None:
    """Read the settings, bind the address and serve. Raises ConfigInvalid, OSError."""
    settings = read_settings(arguments)
    logs.configure(settings.log_level, settings.log_format)
    settings = check_sources(settings)
    if load.only_checks(arguments):
        print(f"The settings are right. Models: {', '.join(spec.key for spec in settings.models) or 'none'}.")
        return
    # Imported modules stay for good. A full garbage collection that scans them pauses every stream for 50 to 300 ms;
    # without them, for 2 ms.
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL)
    leader = lead_or_follow(settings)
    if not settings.has_keys and not is_loopback(settings.host):
        log.warning("Every client that reaches %s may use this server: it has no keys (--api-key).", settings.host)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(find_holder(settings.host, settings.port).describe(settings.host, settings.port)) from None
    uvloop.run(serve(settings, listener, lambda: check_sources(read_settings(arguments)), leader))


def read_settings(arguments: list[str]) -> Settings:
    """The settings of the command line, the environment and the file, over the defaults. Raises ConfigInvalid."""
    return load.build(arguments, os.environ, Settings(models=DEFAULT_MODELS))


def check_sources(settings: Settings) -> Settings:
    """The settings, their sources checked as far as that goes without the network. Raises ConfigInvalid.

    Default models whose package is not installed are left out; the log has the command that installs it.
    """
    left_out: dict[str, list[str]] = {}
    for spec in settings.models:
        try:
            sources.check(spec.source)
        except SourceInvalid as error:
            if spec not in DEFAULT_MODELS:
                raise ModelInvalid(spec.key, error) from None
            left_out.setdefault(str(error), []).append(spec.key)
    for reason, keys in left_out.items():
        log.warning("Without %s. %s", ", ".join(keys), reason)
    missing = {key for keys in left_out.values() for key in keys}
    return replace(settings, models=tuple(spec for spec in settings.models if spec.key not in missing))


def lead_or_follow(settings: Settings) -> Leader | None:
    """Leader of the ranks that this process was started with; None if it was started alone.

    A rank that follows stays in here until it ends. Raises RanksDiffer, LinkLost, OSError.
    """
    if not launch.is_one_of_several(os.environ):
        return None
    facts = launch.shared_facts(__version__, settings)
    if not launch.is_leader(os.environ):
        follower.follow(launch.join(), facts, settings)
    leader = Leader(settings.rank_timeout, settings.wedged_after)
    leader.start(facts, os.environ)
    return leader


async def serve(
    settings: Settings, listener: socket.socket, reread: Callable[[], Settings], leader: Leader | None
) -> None:
    """Serve until a signal comes. `reread` reads the settings again, or raises ConfigInvalid."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    async with running_models(settings, leader) as manager:
        if leader:
            manager.ranks = leader.report

        async def reload() -> Reload:
            changed = await asyncio.to_thread(reread)
            logs.configure(changed.log_level, settings.log_format)
            if leader:
                leader.step = changed.wedged_after
            return await manager.reload(changed)

        manager.library.refresh_soon()
        server = Server(manager, reload)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        loading = asyncio.create_task(manager.preload())
        watching = asyncio.create_task(watch(lambda: manager.all_instances, lambda: manager.settings.wedged_after))
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not serving.done() and not server.should_exit:
            print(await asyncio.to_thread(greeting, url, manager, manager.estimate), flush=True)
        await serving
        watching.cancel()


@asynccontextmanager
async def running_models(settings: Settings, leader: Leader | None = None) -> AsyncIterator[ModelManager]:
    """The manager with its models. At the end all are unloaded, and the leader's ranks released."""
    threads = ThreadPool(streams.thread_stream)

    def estimate_share(spec: ModelSpec) -> Estimate:
        if not leader and spec.shard:  # before a model is evicted for it
            raise sharding.alone(spec)
        position = sharding.RankPosition(0, leader.size if leader else 1)
        return threads.call(lambda: sharding.share(estimate(spec, builder.policies.for_estimate(spec)), spec, position))

    disk, pool = prefix_store(settings), KVPool()
    kept_checks = KeptChecks(cache_directory() / "self-checks")
    kept_choices = KeptChoices(cache_directory() / CHOICES) if settings.measure_policies else None
    builder = Builder(
        settings.stall_target, leader, disk=disk, pool=pool, kept_checks=kept_checks, kept_choices=kept_choices
    )
    manager = ModelManager(
        settings,
        engine_starter(builder, threads),
        device.process_bytes,
        estimate_share,
        device.active_bytes,
        pool,
        Scanner().scan,
    )
    manager.cache_usage, manager.drop_prefixes = builder.prefix_cache.usage, builder.prefix_cache.clear
    try:
        yield manager
    finally:
        if not manager.is_closing:
            await manager.close(0)
        if disk:
            await asyncio.to_thread(disk.close)
        if leader:
            leader.close()
        if stalled := threads.close(THREADS_PATIENCE):
            leave_behind(stalled)


def prefix_store(settings: Settings) -> DiskTier | None:
    """Where prefixes are kept on disk, if anywhere."""
    if not settings.prefix_cache_disk_bytes:
        return None
    chosen = settings.prefix_cache_dir
    folder = cache_directory() / "prefixes" if chosen == "auto" else Path(chosen).expanduser()
    return DiskTier(folder, settings.prefix_cache_disk_bytes)


def engine_starter(builder: Builder, threads: ThreadPool) -> StartEngine:
    """Starts the engine of a model, whose thread loads the model and runs it."""

    def start(
        spec: ModelSpec, on_death: Callable[[EngineError], None], loading: Loading, metrics: ModelMetrics
    ) -> Engine:
        return Engine(
            spec.key,
            lambda: builder.build(spec, loading, metrics),
            free=streams.free_memory,
            stream=streams.finished_work,
            on_death=on_death,
            metrics=metrics,
            start=threads.start,
        )

    return start


def leave_behind(stalled: list[str]) -> None:
    """End the process although threads are stalled in a step: it would wait for them for ever."""
    log.critical("The process ends without its threads %s, which are stalled.", ", ".join(stalled))
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
