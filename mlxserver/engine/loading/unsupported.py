"""What this environment lacks for a model, in one line: a package, or a back-end of MLX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Unsupported(Exception):
    """A model that can't run in this environment, with what is missing."""


@contextmanager
def naming_what_is_missing() -> Iterator[None]:
    """Raise Unsupported for an error of mlx-lm's model code in the block that comes from the environment.

    SystemExit, with which a module of mlx-lm may end at its import, always becomes Unsupported.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if (missing := _missing(error)) is None:
            raise
        raise Unsupported(missing) from error


def _missing(error: BaseException) -> str | None:
    """What an error says is missing; None if it is about something else."""
    cause = error
    if not isinstance(cause, ImportError):
        cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, ImportError) and cause.name and not cause.name.startswith(("mlx_lm", "mlx_vlm.")):
        return f"its architecture needs the Python package {cause.name.split('.')[0]!r}, which is not installed"
    if isinstance(error, SystemExit):
        return "its architecture can't be used here: mlx-lm's module for it ends the process"
    if "No Metal back-end" in str(error):
        return "its architecture needs Metal: mlx-lm has no kernels of it for another device"
    return None
