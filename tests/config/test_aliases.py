"""Patterns of names: what fits them, and when two of them leave open which model is meant."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxserver.config.aliases import clash, fits, is_pattern
from mlxserver.config.errors import ConfigInvalid
from mlxserver.config.load import build
from mlxserver.config.settings import Settings

PATTERNS = st.text("ab*?[]!", min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("alias", "fitting", "others"),
    [
        ("gpt-*", ["gpt-", "gpt-4o", "gpt-4 turbo"], ["GPT-4", "my-gpt-4"]),
        ("claude-?-*", ["claude-3-x"], ["claude-35-x"]),
        ("[ab]*", ["a", "b-1"], ["c", ""]),
        ("*", ["", "anything"], []),
        ("gpt-4", [], ["gpt-4"]),  # no pattern
    ],
)
def test_names_fit_patterns_as_in_fnmatch(alias, fitting, others):
    assert all(fits(name, alias) for name in fitting)
    assert not any(fits(name, alias) for name in others)
    assert is_pattern(alias) == (alias != "gpt-4")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("gpt-4", "gpt-4", True),
        ("gpt-*", "gpt-*", True),
        ("gpt-*", "gpt-4*", False),  # the longer one counts
        ("gpt-*", "*-gpt", True),
        ("gpt-*", "llm-*", False),
        ("a?c*", "ab*d", True),
        ("[ab]x", "[bc]x", True),
        ("[ab]x", "[cd]x", False),
        ("gpt-4", "gpt-?", False),  # a name before a pattern
    ],
)
def test_two_aliases_clash_where_a_name_could_mean_either(first, second, expected):
    assert clash(first, second) == clash(second, first) == expected


@given(PATTERNS, PATTERNS, st.lists(st.text("ab", max_size=6), max_size=30))
def test_patterns_that_one_name_fits_clash(first, second, names):
    if is_pattern(first) and is_pattern(second) and len(first) == len(second):
        both = [name for name in names if fnmatchcase(name, first) and fnmatchcase(name, second)]
        assert clash(first, second) or not both


def built(path, **aliases):
    sections = [f'[models.{key}]\nsource = "org/{key}"\naliases = {names}\n' for key, names in aliases.items()]
    path.write_text("".join(sections))
    return build(["--config", str(path)], {}, Settings()).models


def test_patterns_are_read(tmp_path):
    models = built(tmp_path / "models.toml", a='["gpt-*", "claude-[35]*"]', b='["gpt-4*"]')
    assert [model.aliases for model in models] == [("gpt-*", "claude-[35]*"), ("gpt-4*",)]


@pytest.mark.parametrize("names", ['["gpt-*"]', '["*-gpt"]'])
def test_a_clash_is_refused_with_the_names_of_both_models(tmp_path, names):
    with pytest.raises(ConfigInvalid) as caught:
        built(tmp_path / "models.toml", a='["gpt-*"]', b=names)
    assert all(word in str(caught.value) for word in ("'a'", "models.b.aliases", "gpt-*"))


@pytest.mark.parametrize("names", ['["gpt 4*"]', '["*é"]', '[""]', '["gpt-4", 5]'])
def test_a_wrong_pattern_is_refused(tmp_path, names):
    with pytest.raises(ConfigInvalid, match="patterns"):
        built(tmp_path / "models.toml", a=names)
