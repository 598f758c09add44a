"""Models that are registered, replaced, removed and reloaded while requests use them."""

import asyncio
from dataclasses import replace

import pytest

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import (
    LoadAborted,
    LoadFailed,
    ModelBusy,
    ModelExists,
    ModelNotFound,
    ModelNotLoaded,
    ModelReplaced,
    ModelStalled,
    ModelUnloading,
)
from mlxserver.engine.loading.library.scan import LocalModel
from mlxserver.manager.library import Library
from mlxserver.manager.registry import Registry
from mlxserver.manager.reload import Reload
from mlxserver.manager.tasks import Tasks
from mlxserver.server.models import unless_stalled
from tests.support.managed import ESTIMATE, answered, managed, specs, states, status_is
from tests.support.scripted_engine import read, request, until, within_deadline

# Registered or not


@within_deadline
async def test_a_model_that_is_no_longer_registered_is_not_loaded_again():
    async with managed(capacity=2) as (manager, factory):
        forgotten, replaced = manager.instance("a"), manager.instance("b")
        await manager.forget("a")
        await manager.load(ModelSpec("b", "other"), replaces=True)
        for instance in forgotten, replaced:
            with pytest.raises(ModelUnloading):
                await instance.generate(request())
        assert factory.builds == 1


@within_deadline
async def test_a_model_that_is_being_forgotten_does_not_exist():
    async with managed() as (manager, _):
        await answered(manager, "a")
        first, second = await asyncio.gather(manager.forget("a"), manager.forget("a"), return_exceptions=True)
        assert (first.aborted, type(second)) == (0, ModelNotFound)
        assert manager.keys == ["b", "c"]


@within_deadline
async def test_any_model_is_registered_only_for_a_request_that_it_is_to_serve():
    async with managed(allow_any_model=True) as (manager, factory):
        with pytest.raises(ModelNotFound):
            manager.instance("org/first")
        factory.failures.append(LoadFailed("org/first", "no such repository"))
        with pytest.raises(LoadFailed):
            await answered(manager, "org/first")
        assert len(await answered(manager, "org/second")) == 5
        assert manager.keys == ["a", "b", "c", "org/second"]


@within_deadline
async def test_an_alias_of_one_model_is_no_key_for_another():
    async with managed((ModelSpec("a", "x", aliases=("b",)),)) as (manager, _):
        with pytest.raises(ModelExists, match="'b' is already registered with source 'x', not 'y'"):
            await manager.load(ModelSpec("b", "y"))


@within_deadline
async def test_a_load_may_state_aliases_that_no_other_model_has():
    async with managed(specs("a", aliases=("taken", "gpt-*")), capacity=2) as (manager, _):
        for alias in ("a", "taken", "gpt-*", "gpt-?"):
            with pytest.raises(ModelExists, match="source-a"):
                await manager.load(ModelSpec("b", "other", aliases=("free", alias)))
        assert manager.keys == ["a"]
        await manager.load(ModelSpec("b", "other", aliases=("free", "gpt-4-*")))
        assert {name: manager.instance(name).key for name in ("free", "gpt-4-x", "gpt-5")} == {
            "free": "b",
            "gpt-4-x": "b",
            "gpt-5": "a",
        }


@within_deadline
async def test_a_library_is_searched_again_after_a_moment_or_a_change(tmp_path):
    scans = []
    found = LocalModel("one", None, "directory", tmp_path / "one", tmp_path / "one", tmp_path, 1, 0, None, "damaged")

    def scan(model_dirs):
        scans.append(model_dirs)
        return (found,)

    async with managed(library=True) as (manager, _):
        library = Library(scan, lambda: manager.settings, Registry(), manager.register, Tasks())
        for _ in range(3):
            await library.refresh_if_old()
        assert len(scans) == 1
        (tmp_path / "two").mkdir()
        await library.refresh_if_old()
        await library.refresh_if_old()
        assert len(scans) == 2
        await library.refresh()
        assert len(scans) == 3


@within_deadline
async def test_only_registered_models_are_loaded_unless_any_is_allowed():
    async with managed() as (manager, _):
        with pytest.raises(ModelNotFound):
            await answered(manager, "org/name")
        manager.settings = replace(manager.settings, allow_any_model=True)
        assert len(await answered(manager, "org/name")) == 5
        assert manager.instance("org/name").spec.source == "org/name"
        with pytest.raises(ModelNotFound):
            await answered(manager, "/etc")


@within_deadline
async def test_an_alias_is_another_name():
    async with managed((ModelSpec("a", "x", aliases=("gpt-4", "b")),)) as (manager, _):
        assert manager.instance("gpt-4") is manager.instance("b") is manager.instance("a")


@within_deadline
async def test_a_key_comes_before_an_alias_and_an_alias_before_the_longest_pattern():
    models = (
        ModelSpec("a", "x", aliases=("gpt-*", "gpt-4")),
        ModelSpec("b", "y", aliases=("gpt-4*",)),
        ModelSpec("gpt-5", "z"),
    )
    async with managed(models) as (manager, _):
        names = {"gpt-3": "a", "gpt-4": "a", "gpt-4o": "b", "gpt-5": "gpt-5", "gpt-50": "a"}
        assert {name: manager.instance(name).key for name in names} == names
        assert manager.instance("gpt-9", "gpt-5").key == "gpt-5"  # of several spellings the one that is a key
        with pytest.raises(ModelNotFound):
            manager.instance("GPT-4")


@within_deadline
async def test_a_copied_alias_moves_and_survives_a_change_of_its_model():
    async with managed((ModelSpec("a", "x", aliases=("b",)), ModelSpec("c", "y"))) as (manager, _):
        manager.copy(manager.instance("a"), "copied")
        manager.copy(manager.instance("b"), "copied")
        assert manager.instance("copied").aliases == ("b", "copied")
        manager.copy(manager.instance("c"), "copied")
        assert (manager.instance("a").aliases, manager.instance("copied").key) == (("b",), "c")
        for taken in ("a", "b"):
            with pytest.raises(ModelExists):
                manager.copy(manager.instance("c"), taken)
        await manager.reload(replace(manager.settings, models=(manager.instance("a").spec, ModelSpec("c", "z"))))
        assert manager.instance("copied").spec.source == "z"
        manager.instance("c").forget_alias("copied")
        with pytest.raises(ModelNotFound):
            manager.instance("copied")


# Loads and unloads


@within_deadline
async def test_a_model_is_held_without_a_question():
    async with managed(ttl=1000) as (manager, factory):
        instance = manager.instance("a")
        await instance.hold(0)
        assert factory.builds == 0  # what is to leave at once is not loaded for that
        await instance.hold(500)
        assert states(manager) == "a:loaded"
        assert 400 < instance.expires_in <= 500
        await instance.hold(0)
        await until(status_is(manager, "a", "unloaded"))
        await instance.hold(None)
        assert instance.expires_in > 900


@within_deadline
async def test_a_model_that_is_held_for_no_time_first_finishes_its_requests():
    async with managed() as (manager, factory):
        generation = await manager.resolve("a").generate(request("hello", 3))
        factory.batch.gate.clear()
        await manager.instance("a").hold(0)
        assert states(manager) == "a:loaded"
        factory.batch.gate.set()
        await read(generation)
        assert generation.usage.completion_tokens == 3
        await until(status_is(manager, "a", "unloaded"))


@within_deadline
async def test_without_loads_on_demand_the_error_says_how_to_load():
    async with managed(load_on_demand=False) as (manager, _):
        with pytest.raises(ModelNotLoaded, match="POST /v1/models/load"):
            await answered(manager, "a")
        await manager.load(ModelSpec("a", "source-a"))
        assert len(await answered(manager, "a")) == 5


@within_deadline
async def test_a_forgotten_model_is_gone_and_a_busy_one_that_may_not_wait_stays():
    async with managed() as (manager, _):
        running = await manager.instance("a").generate(request())
        with pytest.raises(ModelBusy):
            await manager.forget("a", "reject")
        assert "a" in manager.keys
        report = await manager.forget("a", "abort")
        assert (report.aborted, manager.keys) == (1, ["b", "c"])
        running.close()


@within_deadline
async def test_an_abort_ends_a_drain_at_once():
    async with managed() as (manager, _):
        await manager.instance("a").generate(request())
        draining = asyncio.create_task(manager.unload("a", "drain"))
        await until(status_is(manager, "a", "draining"))
        reports = [await manager.unload("a", "abort"), await draining]
        assert [report.aborted for report in reports] == [1, 1]


@within_deadline
async def test_closing_aborts_a_load():
    async with managed() as (manager, factory):
        factory.gate.clear()
        waiting = asyncio.create_task(answered(manager, "a"))
        await until(lambda: factory.builds)
        await manager.close(patience=3600)
        with pytest.raises(LoadAborted):
            await waiting
        with pytest.raises(LoadAborted):
            await answered(manager, "b")


@within_deadline
async def test_an_engine_that_does_not_end_well_does_not_keep_its_model():
    async with managed(specs("a"), measure_memory=lambda: 1 // 0) as (manager, factory):
        await answered(manager, "a")
        instance, (engine,) = manager.instance("a"), factory.engines
        stop = engine.stop

        async def stop_badly(patience):
            await stop(patience)
            raise ZeroDivisionError

        engine.stop = stop_badly
        assert (await instance.unload("drain")).freed_bytes == 0
        assert (instance.status, manager.memory.reserved) == ("unloaded", 0)


@within_deadline
async def test_unloading_a_stalled_model_is_an_error_and_goes_on():
    async with managed(specs("a"), wedged_after=0.3) as (manager, factory):
        instance = manager.instance("a")
        await (await instance.generate(request())).accepted()
        factory.batch.gate.clear()
        await until(lambda: instance.is_stalled)
        with pytest.raises(ModelStalled, match="'a' is still being unloaded.*has made no step"):
            await unless_stalled(instance, manager.unload("a", "abort"))
        assert instance.status == "draining"
        factory.batch.gate.set()
        await until(lambda: instance.status == "unloaded")


# Replacing


@within_deadline
async def test_a_source_is_replaced_side_by_side_where_both_fit():
    async with managed(capacity=2) as (manager, _):
        await answered(manager, "a")
        old = manager.instance("a")
        running = await old.generate(request())
        with pytest.raises(ModelExists):
            await manager.load(ModelSpec("a", "other"))
        new = await manager.load(ModelSpec("a", "other"), replaces=True)
        assert manager.instance("a") is new
        assert new.status == "loaded"
        await until(lambda: old.status == "draining")
        running.close()
        await until(lambda: old.status == "unloaded")


@pytest.mark.parametrize("capacity", [1, 2])
@within_deadline
async def test_a_replacement_that_fails_leaves_the_old_model_serving(capacity):
    async with managed(capacity=capacity) as (manager, factory):
        await answered(manager, "a")
        factory.failures.append(LoadFailed("a", "no such file"))
        with pytest.raises(LoadFailed):
            await manager.load(ModelSpec("a", "other"), replaces=True)
        assert manager.instance("a").spec.source == "source-a"
        assert len(await answered(manager, "a")) == 5


@within_deadline
async def test_a_key_is_given_to_one_other_source_at_a_time():
    async with managed(capacity=2) as (manager, factory):
        await answered(manager, "a")
        factory.gate.clear()
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: factory.builds == 2)
        with pytest.raises(ModelReplaced, match="'a' is being replaced already"):
            await manager.load(ModelSpec("a", "third"), replaces=True)
        factory.gate.set()
        assert await replacing is manager.instance("a")


@within_deadline
async def test_closing_aborts_a_replacement():
    async with managed(capacity=2) as (manager, factory):
        await answered(manager, "a")
        factory.gate.clear()
        replacing = asyncio.create_task(manager.load(ModelSpec("a", "other"), replaces=True))
        await until(lambda: factory.builds == 2)
        await manager.close(patience=3600)
        with pytest.raises(LoadAborted):
            await replacing


# Draft models


@within_deadline
async def test_a_model_is_loaded_with_the_spec_of_its_draft():
    seen = []

    def estimate(spec):
        seen.append(spec)
        return ESTIMATE

    a, b = specs("ab")
    async with managed((replace(a, draft="b"), b), estimate=estimate) as (manager, _):
        await answered(manager, "a")
        assert [spec.drafter for spec in seen] == [b]
        assert manager.instance("a").spec.drafter is None
        assert states(manager) == "a:loaded"


@within_deadline
@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        ("a", "its draft 'a' is the model itself"),
        ("x", "its draft 'x' is not registered; there is b, c"),
        ("b", "its draft 'b' has a draft itself, 'a'"),
        ("c", "ranks share it, or its draft 'c'"),
    ],
)
async def test_a_draft_that_a_model_cannot_have_is_refused(draft, reason):
    a, b, c = specs()
    models = (replace(a, draft=draft), replace(b, draft="a"), replace(c, shard="tensor"))
    async with managed(models) as (manager, factory):
        with pytest.raises(LoadFailed, match=reason):
            await answered(manager, "a")
        assert factory.builds == 0


# New settings


@within_deadline
async def test_new_settings_touch_only_the_models_that_changed():
    async with managed(capacity=3) as (manager, factory):
        for key in "abc":
            await answered(manager, key)
        kept = manager.instance("a")
        a, _, c = manager.settings.models
        models = (replace(a, ttl=5.0), replace(c, source="other"), ModelSpec("d", "source-d"))
        reload = await manager.reload(replace(manager.settings, models=models, port=1))
        assert reload == Reload(added=("d",), removed=("b",), changed=("a", "c"), restart_needed=("port",))
        assert (manager.instance("a"), kept.spec.ttl, kept.status) == (kept, 5.0, "loaded")
        await until(status_is(manager, "c", "loaded"))
        assert manager.instance("c").spec.source == "other"
        assert sorted(manager.keys) == ["a", "c", "d"]
        assert factory.builds == 4


@within_deadline
async def test_models_loaded_at_run_time_survive_new_settings():
    async with managed(capacity=2) as (manager, _):
        await manager.load(ModelSpec("mine", "source"))
        assert await manager.reload(manager.settings) == Reload()
        assert manager.instance("mine").status == "loaded"
