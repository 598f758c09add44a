"""Declarations of settings are read with their marks, and a secret value is shown nowhere."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.fields import Identity, Internal, Live, Range, Secret, Several, Shared, Size, marked, settings_of
from mlxserver.config.settings import ModelSpec, Settings


@dataclass
class Base:
    secret: Annotated[tuple[str, ...], Several("[a-z]+", "small letters"), Secret(), "a secret"] = ()
    port: Annotated[int, Range(1, 9), Shared()] = 1


@dataclass
class Schema(Base):
    size: Annotated[int | None, Range(0), Size(), Live(), "bytes"] = None
    other: Annotated[dict[str, int] | None, Live()] = None
    plain: bool = False


def test_own_settings_come_before_inherited_ones_and_fields_of_other_types_are_none():
    assert list(settings_of(Schema)) == ["size", "plain", "secret", "port"]


def test_what_a_load_finds_is_no_setting():
    assert marked(ModelSpec, Internal) == ("drafter", "is_widened")
    assert not {"drafter", "is_widened"} & settings_of(ModelSpec).keys()


def test_a_setting_has_all_that_its_annotation_says():
    size = settings_of(Schema)["size"]
    assert (size.type, size.range, size.is_size, size.is_secret, size.meaning) == (int, Range(0), True, False, "bytes")
    assert (settings_of(Schema)["secret"].is_secret, settings_of(Schema)["secret"].meaning) == (True, "a secret")


def test_marks_are_found_on_fields_of_any_type():
    assert marked(Schema, Live) == ("size", "other")
    assert marked(Schema, Shared) == ("port",)
    assert marked(Schema, Identity) == ()


def test_a_wrong_value_is_quoted_unless_it_is_secret():
    with pytest.raises(ConfigInvalid, match="port: 10 is not valid; expected an integer from 1 to 9"):
        settings_of(Schema)["port"].check("port", 10)
    with pytest.raises(ConfigInvalid, match=r"secret: '\(not shown\)' is not valid; expected small letters"):
        settings_of(Schema)["secret"].check("secret", ["SECRET"])


def test_every_secret_setting_can_be_changed_without_a_restart_and_is_not_in_the_repr():
    assert set(marked(Settings, Secret)) < set(marked(Settings, Live))
    assert not [name for name in marked(Settings, Secret) if f"{name}=" in repr(Settings())]


def test_what_makes_another_model_does_not_apply_to_a_loaded_one():
    assert not set(marked(ModelSpec, Identity)) & set(marked(ModelSpec, Live))
