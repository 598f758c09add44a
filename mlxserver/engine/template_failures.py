"""What a chat template may raise: its own errors, and those of the expressions in it."""

from jinja2 import TemplateError

TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
