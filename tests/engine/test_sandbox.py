"""Sandbox of chat templates: attributes are looked up as Jinja's own sandbox does it, at less cost."""

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

from mlxserver.engine.prompt.sandbox import Attributes, look_up_once

OBJECTS = [
    {"role": "user", "items": 1, "format": "f", "_own": 2},
    [1, 2],
    (1, 2),
    "text",
    1,
    1.5,
    True,
    None,
    Namespace(x=1, format="a".upper),
    dict,
    len,
    (lambda: 0),
    "a".format,
    (number for number in ()),
    type("Own", (dict,), {"hidden": 1})(role="x"),
]
METHODS = ["items", "keys", "get", "pop", "update", "clear", "append", "sort", "index", "count", "upper", "format_map"]
INTERNAL = ["__class__", "__init__", "__globals__", "__dict__", "__self__", "_own", "gi_frame", "func_globals", "mro"]
NAMES = [*METHODS, *INTERNAL, "role", "format", "x", "missing", "hidden", "real"]


def outcome(get, obj, name):
    """What a lookup gives: its value, as far as values can be compared, or why there is none."""
    value = get(obj, name)
    if isinstance(value, ImmutableSandboxedEnvironment().undefined):
        try:
            str(value.more)
        except SecurityError as error:
            return "unsafe", str(error)
        except TemplateError as error:
            return "missing", str(error)
    return type(value), str(value) if not callable(value) else getattr(value, "__name__", None)


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: type(obj).__name__)
def test_every_attribute_is_what_the_sandbox_gives(obj):
    environment = ImmutableSandboxedEnvironment()
    attributes = Attributes(environment)
    for _ in range(2):  # the second time from what is kept
        for name in NAMES:
            assert outcome(attributes.get, obj, name) == outcome(environment.getattr, obj, name), name


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(messages) }}",
        "{{ messages | map(attribute='__class__') | list | first }}",
        "{{ messages | attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for m in messages %}{{ loop.__class__ }}{{ loop._iterable.gi_frame }}{% endfor %}",
    ],
)
def test_what_the_sandbox_refuses_is_refused_each_time(attack):
    template = "{% for n in range(3) %}{% for m in messages %}{{ m.role }}{% endfor %}{% endfor %}" + attack
    before = attempt(template)
    assert before == "refused" or before == "userassistant" * 3  # what is unsafe shows as nothing
    look_up_once(template)
    assert [attempt(template), attempt(template)] == [before, before]


def attempt(template):
    try:
        return render(template)
    except SecurityError:
        return "refused"


def test_a_template_of_all_kinds_of_lookups_is_rendered_the_same():
    template = (
        "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + loop.index0 %}"
        "{{ m.role.upper() }}:{{ m.content.split(' ') | join('|') }}{{ m.name or '-' }}{{ m.items() | list | length }}"
        "{% if loop.first %}F{% endif %}{% if loop.last %}L{{ loop.previtem.role }}{% endif %}"
        "{{ '{} {r}'.format(m.role, r=m.content) }}{% if m.tool_calls is defined %}!{% endif %}{% endfor %}{{ ns.n }}"
    )
    before = render(template)
    look_up_once(template)
    assert render(template) == before
    assert "USER:a|b" in before


def render(template):
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c", "name": "d"}]
    return chat_template_utils.render_jinja_template([messages], chat_template=template)[0][0]
