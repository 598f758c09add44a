"""The documents name all that a user can set, send, read and type, and their links lead somewhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_api_server import DEFAULT_MODELS
from mlxserver.api import openapi
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.client.shell.commands import COMMANDS
from mlxserver.config.fields import Live, marked, settings_of
from mlxserver.config.load import CACHE_VARIABLE, MODEL_FIELDS
from mlxserver.config.sampling_params import MODEL_DEFAULTS
from mlxserver.config.settings import POLICY_FIELDS, Settings
from mlxserver.manager.states import TRANSITIONS
from mlxserver.server.errors import ERRORS
from mlxserver.server.metrics import GAUGES, HISTOGRAMS, KINDS, TOTALS

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
API = openapi.document(ENDPOINTS, "", "")


def text_of(*names):
    return "\n".join((ROOT / name).read_text() for name in names)


def code_in(*names):
    """All words in the code spans and blocks of some pages: what they name, not what they say."""
    spans = re.findall(r"```.*?```|`[^`\n]+`", text_of(*names), re.DOTALL)
    return set(re.findall(r"[\w/{}.-]+", " ".join(spans)))


def properties_of(schema):
    """The names of all properties in a JSON schema, however deep."""
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield from schema["properties"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from properties_of(part)


def section(heading):
    """The text under a heading of docs/architecture.md."""
    return text_of("docs/architecture.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def anchors_of(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert 5000 <= len(readme.encode()) <= 6500
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(readme)}
    assert {page.resolve() for page in PAGES} - linked == {(ROOT / "README.md").resolve()}
    for spec in DEFAULT_MODELS:
        assert f"| `{spec.key}` | {spec.type or spec.kind} | `{spec.source}`" in readme


def test_every_setting_is_explained():
    named = code_in("docs/configuration.md")
    expected = {*settings_of(Settings), *MODEL_FIELDS, *MODEL_DEFAULTS, *POLICY_FIELDS, "aliases", CACHE_VARIABLE}
    assert expected - named == set()


def test_the_settings_that_take_effect_at_a_reload_are_listed():
    listed = text_of("docs/configuration.md").partition("\n## Reload\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", listed))
    assert named & set(settings_of(Settings)) == set(marked(Settings, Live)) - {"models"}


def test_the_defaults_of_plain_settings_are_stated():
    rows = re.findall(r"^\| `(\w+)` \| `?([\w.,]+)`? \|", text_of("docs/configuration.md"), re.MULTILINE)
    stated = {name: value.replace(",", "") for name, value in rows if name in settings_of(Settings)}
    assert len(stated) > 20
    for name, value in stated.items():
        default = getattr(Settings(), name)
        expected = f"{default:g}" if isinstance(default, float) else str(default).lower()
        assert value == ("none" if default == () else expected), name


def test_every_endpoint_parameter_and_answer_is_explained():
    named = code_in("docs/api.md", "docs/models.md", "docs/operations.md", "docs/memory.md")
    assert {endpoint.path for endpoint in ENDPOINTS} - named == set()
    requests = {endpoint.request for endpoint in ENDPOINTS if endpoint.request}
    parameters = {
        name
        for request in requests
        for names in (request.__fields__, request.__unsupported__, request.__no_effect__, request.__not_applied__)
        for name in names
    }
    assert len(parameters) > 60
    assert parameters - named == set()
    answers = set(properties_of(API["components"]["schemas"]))
    assert len(answers) > 60
    assert answers - named == set()


def test_every_error_code_is_explained():
    named = code_in("docs/api.md")
    source = "\n".join(path.read_text() for path in (ROOT / "mlxserver").rglob("*.py"))
    codes = {code for *_, code in ERRORS if code} | set(re.findall(r'code="(\w+)"', source))
    assert len(codes) >= 25
    assert codes - named == set()
    statuses = {status for _, status, *_ in ERRORS} | {401, 405, 413, 431}
    assert {status for status in statuses if f"\n| {status} |" not in text_of("docs/api.md")} == set()


def test_every_metric_is_explained():
    counters = {f"{name}_total" for name in [*TOTALS, *KINDS]}
    process = set(re.findall(r'PREFIX \+ "(\w+)"', text_of("mlxserver/server/metrics.py")))
    ranks = set(re.findall(r'"(rank_\w+)": ', text_of("mlxserver/server/metrics.py")))
    assert process and ranks
    assert {*HISTOGRAMS, *counters, *GAUGES, *process, *ranks} - code_in("docs/operations.md") == set()


@pytest.mark.parametrize("client", ["simple_client.py", "advanced_client.py"])
def test_every_flag_of_a_client_is_explained(client):
    helped = subprocess.run([sys.executable, ROOT / client, "--help"], capture_output=True, text=True, check=True)
    flags = set(re.findall(r"--[a-z-]+", helped.stdout)) - {"--help"}
    assert len(flags) > 8
    assert flags - code_in("docs/clients.md") == set()


def test_every_command_of_the_shell_is_explained():
    assert {f"/{name}" for name in COMMANDS} - code_in("docs/clients.md") == set()


def test_the_table_of_layers_is_the_one_that_holds():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) ?\|$", section("Layers"), re.MULTILINE)
    source = text_of("tests/test_architecture.py")
    allowed = re.search(r"^ALLOWED = (\{.*?^\})", source, re.MULTILINE | re.DOTALL)[1]
    assert {row: " ".join(re.findall(r"`([\w.]+)`", names)) for row, names in rows} == ast.literal_eval(allowed)


def test_the_table_of_a_models_lifecycle_is_complete():
    rows = re.findall(r"^\| ([A-Z]+) \| ([A-Z]+) \|", section("Lifecycle of a model"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == {(state.name, after.name) for state in TRANSITIONS for after in TRANSITIONS[state]}


def test_documents_name_no_file_of_ours_that_does_not_exist():
    """Pages name many files in passing; those must not be left behind when files move."""
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        named = re.findall(r"`((?:mlxserver|tests|tools|benchmarks|deploy|adapters|docs)/[\w./@-]+)`", page.read_text())
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name
