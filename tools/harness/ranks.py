"""Several ranks on this machine, with the environment that mlx.launch gives them: a rank and the host file."""

import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load_file, save_file

from tools.harness.models import tiny_llama
from tools.harness.running_server import DEADLINE, GREETING, ROOT, RunningServer, eventually, server_environment

UNASSIGNED = (20_000, 32_768)  # below what Linux, macOS and the IANA have for sockets that ask for no port


@dataclass
class Ranks:
    """Running ranks: the server (rank 0), and the processes and logs of all."""

    server: RunningServer
    processes: list[subprocess.Popen]
    logs: list = field(default_factory=list)

    def log(self, rank):
        self.logs[rank].seek(0)
        return self.logs[rank].read()


@contextmanager
def running_ranks(config, *, size=2, configs=None, scripts=None, variables=None):
    """Ranks that are ready; killed at the end. configs, scripts: settings files and programs of single ranks."""
    with tempfile.TemporaryDirectory() as directory:
        own_configs = [(configs or {}).get(rank, config) for rank in range(size)]
        processes, logs = start_ranks(Path(directory), own_configs, scripts, variables)
        hung = threading.Timer(DEADLINE, processes[0].kill)
        hung.start()
        try:
            line = next((line for line in processes[0].stdout if line.startswith(GREETING)), None)
            hung.cancel()
            ranks = Ranks(None, processes, logs)
            assert line, "\n".join(ranks.log(rank) for rank in range(size))
            ranks.server = RunningServer(processes[0], logs[0], line.removeprefix("Serving on ").strip())
            yield ranks
        finally:
            hung.cancel()
            end(processes, logs)


def start_ranks(directory, configs, scripts=None, variables=None, wanted=None):
    """Start ranks; their processes, and the files of their stderr. wanted: how many of the ranks are started."""
    scripts, variables = scripts or {}, variables or {}
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(configs))]))
    logs = [tempfile.TemporaryFile("a+") for _ in configs]  # noqa: SIM115  (they live as long as the processes)
    processes = []
    for rank, (config, log) in enumerate(list(zip(configs, logs, strict=True))[:wanted]):
        environment = server_environment() | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} | variables
        command = [
            sys.executable,
            scripts.get(rank, "mlx_api_server.py"),
            "--no-defaults",
            "--port",
            "0",
            "--config",
            str(config),
        ]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        )
        eventually(lambda: computes(processes[0]))  # a rank that is much earlier retries after 1, 2, 4, 8 s
    return processes, logs


def computes(leader):
    """Whether rank 0 has started its compute process; true where the system does not report that."""
    children = Path(f"/proc/{leader.pid}/task/{leader.pid}/children")
    return not children.exists() or children.read_text() or leader.poll() is not None


def end(processes, logs):
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
    for log in logs:
        log.close()


def free_ports(count):
    """Ports that nothing listens on, and that no socket gets unasked: ranks take them seconds later."""
    ports = []
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(*UNASSIGNED))) as found:
            ports.append(found.getsockname()[1])
    return ports


def tiny_qwen(path, **options):
    """Write a tiny llama as a qwen2, which mlx-lm can run as a pipeline: the same weights, with nonzero biases."""
    tiny_llama(path, **options)
    config = json.loads((path / "config.json").read_text())
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
    weights = load_file(path / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in heads:
            weight = weights[f"model.layers.{layer}.self_attn.{name}.weight"]
            weights[f"model.layers.{layer}.self_attn.{name}.bias"] = weight[:, 0].copy()
    save_file(weights, path / "model.safetensors", metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    return path
