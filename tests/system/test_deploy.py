"""The examples in deploy/ fit the server and each other. tools/replicas.py runs the balancer itself."""

import plistlib
import re
import shlex
from pathlib import Path

import pytest

from mlxserver.config.load import build
from mlxserver.config.settings import Settings

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
ADDRESS = r"127\.0\.0\.1:\d+"


def test_the_balancers_second_attempt_knows_the_same_servers_as_its_first():
    text = (DEPLOY / "nginx" / "mlx-servers.conf").read_text()
    upstream = re.search(r"upstream mlx_servers \{(.*?)\}", text, re.DOTALL)[1]
    again = re.search(r'set \$servers "(.*?)"', text)[1]
    assert re.findall(ADDRESS, upstream) == again.split() != []


def test_the_balancer_begins_no_request_twice():
    """Of a POST nginx then tries again only what it could not connect for."""
    text = (DEPLOY / "nginx" / "mlx-servers.conf").read_text()
    assert re.search(r"proxy_next_upstream error timeout;", text)
    assert "non_idempotent" not in text


@pytest.mark.parametrize("unit", sorted(DEPLOY.glob("systemd/*.service")), ids=lambda path: path.name)
def test_a_unit_starts_the_server_with_flags_that_exist_and_lets_it_finish(unit):
    (command,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    check_command(shlex.split(command.replace("%i", "8001")))
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)
    assert int(patience) > Settings().shutdown_timeout


def test_the_agent_starts_the_server_with_flags_that_exist_and_lets_it_finish():
    agent = plistlib.loads((DEPLOY / "launchd" / "mlx-server.plist").read_bytes())
    check_command(agent["ProgramArguments"])
    assert agent["ExitTimeOut"] > Settings().shutdown_timeout


def check_command(command):
    """What is behind the program is understood; the file of settings is on another machine."""
    program, flags = command[:2], command[2:]
    assert program[1] == "mlx_api_server.py"
    at = flags.index("--config")
    del flags[at : at + 2]
    build(flags, {}, Settings())
