"""Differences between settings, and between specs of a model, from the marks of their fields (config/fields.py)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from mlxserver.config.fields import Identity, Live, marked
from mlxserver.config.settings import ModelSpec, Settings


@dataclass(frozen=True, slots=True)
class Reload:
    """What new settings change: keys of models, and names of settings that need a restart."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()


def changes(old: Settings, new: Settings, registered: Collection[str]) -> Reload:
    """What the new settings change where models with these keys are registered."""
    before, after = ({spec.key: spec for spec in settings.models} for settings in (old, new))
    fixed = [field.name for field in fields(Settings) if field.name not in marked(Settings, Live)]
    return Reload(
        added=tuple(key for key in after if key not in registered),
        removed=tuple(key for key in before if key not in after and key in registered),
        changed=tuple(key for key in after if key in registered and after[key] != before.get(key)),
        restart_needed=tuple(name for name in fixed if getattr(new, name) != getattr(old, name)),
    )


def is_live(known: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a model can take its new spec without being loaded anew."""
    return replace(known, **{name: getattr(spec, name) for name in marked(ModelSpec, Live)}) == spec


def contradicts(asked: ModelSpec, known: ModelSpec) -> bool:
    """Whether two specs can't be of one model. A field that `asked` leaves open agrees with any value."""
    stated = ((getattr(asked, name), getattr(known, name)) for name in marked(ModelSpec, Identity))
    return any(want is not None and want != has for want, has in stated)
