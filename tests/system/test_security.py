"""What SECURITY.md says of known findings stays true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SERVING = [ROOT / "mlx_api_server.py", ROOT / "model_manager.py"]
SERVING += [*ROOT.glob("mlxserver/manager/*.py"), *ROOT.glob("mlxserver/server/*.py")]
CONCERNED = {"url", "base_url", "url_for", "form", "StaticFiles", "FileResponse", "HTTPEndpoint"}


@pytest.mark.parametrize("path", SERVING, ids=lambda path: path.stem)
def test_nothing_is_used_that_a_finding_in_starlette_concerns(path):
    used = {
        getattr(node, "attr", getattr(node, "name", None))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.alias)
    }
    assert not used & CONCERNED


def test_every_finding_that_the_audit_leaves_out_is_explained():
    left_out = re.search(r"^EXPLAINED := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    explained = re.findall(r"^\| (CVE-\S+) \|", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert sorted(left_out[1].split()) == sorted(explained)
