"""schemathesis: requests made from the server's OpenAPI document, and answers that must be as it describes them."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlxserver.api.endpoints import ENDPOINTS
from tools.ecosystem.environments import programs_of, run

SECONDS = 120  # of requests
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
LEFT_OUT = [each.path for each in ENDPOINTS if each.manages and each.request]  # they load what they are asked for
LEFT_OUT.append("/v1/events")  # a stream without an end
OPTIONS = (
    *("--phases", "coverage,fuzzing", "--max-time", str(SECONDS), "--checks", ",".join(CHECKS)),
    *("--request-timeout", "60", "--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off"),
)


@dataclass(frozen=True, slots=True)
class Contract:
    """The run. It uses the models of the other clients."""

    name: str = "schemathesis"
    directory: str = "schemathesis"

    def write_model(self, directory: Path) -> str:
        """It has no model of its own."""
        return ""

    def try_out(self, directory: Path, url: str) -> str:
        """Install schemathesis into a directory and run it; one line on the outcome.

        Raises CalledProcessError if an answer is not as described, TimeoutExpired.
        """
        program = programs_of(directory, ("schemathesis",)) / "schemathesis"
        left_out = [part for path in LEFT_OUT for part in ("--exclude-path", path)]
        with tempfile.TemporaryDirectory() as work:
            printed = run([str(program), "run", f"{url}/openapi.json", *OPTIONS, *left_out], cwd=work)
        found = re.search(r"(\d+) generated, (\d+) passed", printed)
        return found[0] if found else printed[-200:]
