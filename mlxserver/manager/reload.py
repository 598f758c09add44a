"""What new settings, and new specs of a model, change of what there is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from mlxserver.config.settings import ModelSpec, Settings

# What changes with new settings while the model stays as it is.
_LIVE_FIELDS = ("aliases", "pin", "preload", "ttl", "max_waiting")
_LIVE_SETTINGS = {
    "models", "log_level", "memory_limit", "min_residency", "max_wait", "ttl", "load_on_demand", "allow_any_model",
    "wedged_after", "api_key", "admin_key", "api_key_file", "admin_key_file", "allow_host", "allow_origin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reload:
    """What new settings changed: keys of models, and names of settings that take a restart."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()


def changes(old: Settings, new: Settings, registered: Collection[str]) -> Reload:
    """What the new settings change where models of these keys are registered."""
    before, after = ({spec.key: spec for spec in settings.models} for settings in (old, new))
    fixed = [field.name for field in fields(Settings) if field.name not in _LIVE_SETTINGS]
    return Reload(
        added=tuple(key for key in after if key not in registered),
        removed=tuple(key for key in before if key not in after and key in registered),
        changed=tuple(key for key in after if key in registered and after[key] != before.get(key)),
        restart_needed=tuple(name for name in fixed if getattr(new, name) != getattr(old, name)),
    )


def is_live(known: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a model can become what its new spec says without being loaded anew."""
    return replace(known, **{name: getattr(spec, name) for name in _LIVE_FIELDS}) == spec


def contradicts(asked: ModelSpec, known: ModelSpec) -> bool:
    """Whether two specs can't be one model's. What `asked` leaves open agrees with anything."""
    names = ("adapter", "type", "context_length", "shard")
    stated = ((getattr(asked, name), getattr(known, name)) for name in names)
    return asked.source != known.source or any(want is not None and want != has for want, has in stated)
