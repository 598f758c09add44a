"""Differences between settings: what applies at once, what needs a restart, what makes another model."""

from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.manager.reload import Reload, changes, contradicts, is_live

SPEC = ModelSpec("a", "source")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shutdown_timeout", 1.0),
        ("wedged_after", 2.0),
        ("ttl", 3.0),
        ("api_key", ("a-new-key",)),
        ("log_level", "debug"),
    ],
)
def test_a_live_setting_needs_no_restart(name, value):
    assert changes(Settings(), replace(Settings(), **{name: value}), ()) == Reload()


@pytest.mark.parametrize(("name", "value"), [("port", 1), ("log_format", "json"), ("max_choices", 2)])
def test_any_other_setting_needs_a_restart(name, value):
    assert changes(Settings(), replace(Settings(), **{name: value}), ()).restart_needed == (name,)


def test_models_are_added_removed_and_changed_by_key():
    a, b, c = (ModelSpec(key, "source") for key in "abc")
    found = changes(Settings(models=(a, b)), Settings(models=(replace(a, pin=True), c)), ("a", "b", "at-run-time"))
    assert found == Reload(added=("c",), removed=("b",), changed=("a",))


def test_a_model_takes_live_changes_as_it_is():
    assert is_live(SPEC, replace(SPEC, ttl=1.0, pin=True, preload=True, aliases=("b",), max_waiting=1))
    assert not is_live(SPEC, replace(SPEC, ttl=1.0, max_running=1))


@pytest.mark.parametrize(
    "change", [{"source": "x"}, {"adapter": "x"}, {"type": "thinking"}, {"context_length": 1}, {"shard": "tensor"}]
)
def test_a_stated_identity_contradicts_another_one(change):
    assert contradicts(replace(SPEC, **change), SPEC)
    assert contradicts(SPEC, replace(SPEC, **change)) == ("source" in change)


def test_other_fields_contradict_nothing():
    assert not contradicts(replace(SPEC, max_running=1, cache_tokens=64, ttl=1.0), SPEC)
