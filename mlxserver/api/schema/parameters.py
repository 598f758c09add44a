"""Declaration and parsing of requests: parameters of a satya model, and the one way from a body to a request object.

Rule 1: a parameter is declared once; what validates it and what describes it (json_schema) come from that declaration.
        What is declared is honoured, or its description states that it has no effect.
Rule 2: types are JSON's own. true is no number and "5" no integer; 1.0 is an integer, 1.5 is none.
Rule 3: null for an optional parameter is its default. A parameter that is not declared is refused, or noted as ignored
        where the limits ask for that; so is a field inside of one whose shape is closed.
Rule 4: whatever the bytes are, the outcome is a request or one ValidationFailed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import orjson
from satya import Field, Model, ModelValidationError

from mlxserver.api.schema.unknown_fields import drop_fields

Check = Callable[[Any, str], Any]

TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object"}
EXPECTATIONS = {str: "a string", bool: "true or false", int: "an integer", float: "a number", dict: "an object"}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
ABBREVIATED_LENGTH = 80


class ValidationFailed(Exception):
    """The request can't be understood. `param` names the field, as in "messages[2].role"; None is the whole body."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


def invalid(param: str, value: object, expected: str) -> ValidationFailed:
    """The error for a value that is not what `param` takes. `expected` is a noun phrase: "a number from 0 to 2"."""
    return ValidationFailed(f"Invalid value for '{param}': {abbreviate(value)}. Expected {expected}.", param)


def abbreviate(value: object) -> str:
    """A value as an error message names it: JSON's words, one line, never long, whatever its depth."""
    if isinstance(value, dict):
        return "an object" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value) if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    return text if len(text) <= ABBREVIATED_LENGTH else f"{text[:ABBREVIATED_LENGTH]}..."


class Parameter(Field):  # type: ignore[misc]
    """One parameter: its JSON type and bounds, checked by satya, and for a value with structure a check of ours.

    check takes (value, param), returns the value that handlers see and raises ValidationFailed.
    shape is the JSON schema of a value with structure, whose type is then `object`.
    """

    def __init__(
        self,
        type_: type,
        description: str,
        *,
        required: bool = False,
        check: Check | None = None,
        shape: dict[str, Any] | None = None,
        **constraints: Any,
    ) -> None:
        super().__init__(type_, description=description, required=required, **constraints)
        self.check = check
        self.shape = shape

    def typed(self, value: Any, param: str) -> Any:
        """The value in its Python type, ints where ints and floats where floats are declared."""
        if self.type is object or (type(value) is self.type):
            return value
        if self.type is float and type(value) is int:
            return float(value)
        if self.type is int and type(value) is float and value.is_integer():
            return int(value)
        raise invalid(param, value, self.expected)

    @property
    def expected(self) -> str:
        """What the parameter takes, as a noun phrase."""
        if self.enum:
            return "one of " + ", ".join(repr(choice) for choice in self.enum)
        if self.ge is not None and self.ge == self.le:
            return str(self.ge)
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        bounds = [f"{word} {getattr(self, name)}" for name, word in words.items() if getattr(self, name) is not None]
        return f"{EXPECTATIONS.get(self.type, 'a value')} {' and '.join(bounds)}".rstrip()

    def schema(self) -> dict[str, Any]:
        """The parameter in JSON schema (OpenAPI 3.1)."""
        schema: dict[str, Any] = dict(self.shape) if self.shape else {"type": TYPE_NAMES[self.type]}
        schema |= {word: getattr(self, name) for name, word in BOUNDS.items() if getattr(self, name) is not None}
        if self.enum:
            schema["enum"] = self.enum
        if not self.required:
            # The default of a value with structure is what its check would make, so null stands for it.
            schema = {"anyOf": [schema, {"type": "null"}], "default": None if self.shape else self.default}
        return {"description": self.description, **schema}


class Request(Model):  # type: ignore[misc]
    """A request body. Its parameters are its attributes; one that was not given is its default.

    `__unsupported__` names parameters that clients may know from elsewhere, and what to do instead. `__no_effect__`:
    parameters that are accepted with any value, and why that does no harm. `__not_applied__`: parameters that are
    accepted, too, but noted as ignored unless their value is one of those that change nothing. ignored: names of
    parameters and fields that were given and ignored.
    """

    __unsupported__: ClassVar[Mapping[str, str]] = {}
    __no_effect__: ClassVar[Mapping[str, str]] = {}
    __not_applied__: ClassVar[Mapping[str, Collection[Any]]] = {}
    ignored = tuple[str, ...]()  # without an annotation, of which satya would make a parameter

    def __init_subclass__(cls) -> None:
        # satya would find these at the parent: a validator without the fields of this class, and its fields' bare types
        cls._validator_instance = None
        cls.__annotations__ = inspect.get_annotations(cls)

    def check_together(self) -> None:
        """Check what no parameter can check alone. Raises ValidationFailed."""


R = TypeVar("R", bound=Request)


class Bounds(Protocol):
    """Limits of a request as a whole (api/schema/limits.py)."""

    @property
    def ignores_unknown(self) -> bool:
        """Whether unknown parameters are ignored instead of refused."""

    def check_body(self, body: bytes) -> None:
        """Raise ValidationFailed for a body that would take long to read."""

    def check(self, document: Mapping[str, Any], body_bytes: int) -> None:
        """Raise ValidationFailed for a request that asks for too much."""


def parse(schema: type[R], body: bytes, limits: Bounds | None = None) -> R:
    """The request in a JSON body. Raises ValidationFailed, and nothing else."""
    if limits:
        limits.check_body(body)
    document = _read_object(body)
    if limits:
        limits.check(document, len(body))
    ignores_unknown = limits is not None and limits.ignores_unknown
    values, unknown = _known(schema, document)
    if unknown and not ignores_unknown:
        raise _unknown(schema, unknown[0])
    parameters = schema.__fields__
    typed = {name: parameters[name].typed(value, name) for name, value in values.items()}
    shapes = {name: parameters[name].shape or {} for name in typed}
    ignored = [*_not_applied(schema, document), *unknown, *drop_fields(typed, shapes, drops_all=ignores_unknown)]
    try:
        request = schema.model_validate(typed)
    except ModelValidationError as error:
        raise _translated(error, parameters, values) from None
    attributes = vars(request)
    attributes.update(dict.fromkeys(parameters) | attributes)  # satya looks for one that is missing, at every read
    if ignored:
        request.ignored = tuple(ignored)
    for name, value in typed.items():
        if parameters[name].check is not None:
            setattr(request, name, parameters[name].check(value, name))
    request.check_together()
    return request  # type: ignore[no-any-return]


def json_schema(schema: type[Request]) -> dict[str, Any]:
    """The JSON schema of a request body (OpenAPI 3.1)."""
    parameters = schema.__fields__
    unsupported = {name: {"description": hint, "type": "null"} for name, hint in schema.__unsupported__.items()}
    no_effect = {
        name: {"description": f"Accepted without effect: {why}."} for name, why in schema.__no_effect__.items()
    }
    not_applied = {name: {"description": "Accepted, but not applied."} for name in schema.__not_applied__}
    declared = {name: parameter.schema() for name, parameter in parameters.items()}
    return {
        "type": "object",
        "properties": declared | unsupported | no_effect | not_applied,
        "required": [name for name, parameter in parameters.items() if parameter.required],
        "additionalProperties": False,
    }


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValidationFailed(f"The body is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise ValidationFailed(f"The body is {abbreviate(document)}. Expected a JSON object.")
    return document


def _known(schema: type[Request], document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The declared parameters that were given, and the names of the others."""
    given = {name: value for name, value in document.items() if value is not None or name not in schema.__unsupported__}
    known = {name: value for name, value in given.items() if value is not None and name in schema.__fields__}
    accepted = {*schema.__fields__, *schema.__no_effect__, *schema.__not_applied__}
    return known, [name for name in given if name not in accepted]


def _not_applied(schema: type[Request], document: Mapping[str, Any]) -> Iterator[str]:
    """The names of given parameters that ask for something that is not done."""
    for name, harmless in schema.__not_applied__.items():
        if (value := document.get(name)) is not None and value not in harmless:
            yield name


def _unknown(schema: type[Request], name: str) -> ValidationFailed:
    if name in schema.__unsupported__:
        return ValidationFailed(f"'{name}' is not supported. {schema.__unsupported__[name]}", name)
    known = ", ".join(schema.__fields__)
    return ValidationFailed(
        f"Unknown parameter: {abbreviate(name)}. Parameters here: {known}.", name[:ABBREVIATED_LENGTH]
    )


def _translated(error: Any, parameters: dict[str, Parameter], values: dict[str, Any]) -> ValidationFailed:
    """satya's first error as ours: the field is satya's, the wording comes from the declaration."""
    param = error.errors[0].field
    if param not in parameters:
        return ValidationFailed(str(error))
    if param not in values:
        return ValidationFailed(f"Missing required parameter: '{param}'.", param)
    return invalid(param, values[param], parameters[param].expected)
