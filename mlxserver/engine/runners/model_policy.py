"""Policy of one model: that of the device, with what was measured for its shape, and what its settings fix."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxserver.config.settings import POLICY_FIELDS, ModelSpec
from mlxserver.engine.errors import LoadFailed
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.kept_choices import WEIGHTS, Choice, KeptChoices
from mlxserver.engine.loading.metadata import LAYER_KEYS, WIDTH_KEYS, first_stated
from mlxserver.engine.platform import device
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.requests import PolicyFacts
from mlxserver.engine.runners.kept_checks import code_version, environment
from mlxserver.engine.runners.measured_policies import Result

log = logging.getLogger("engine")

Naming = Callable[[ModelSpec, Mapping[str, Any], ExecutionPolicy], str]

# Of a config.json: they change nothing that is computed.
_NO_SHAPE = ("_name_or_path", "transformers_version", "eos_token_id", "bos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class ModelPolicy:
    """Policy that a model is loaded with. measured, fixed: its fields that are so for that reason.

    choice: what is known of the shape; weights: of its weights' format. None where nothing is measured.
    is_widened, states_weights: whether the format is 16 bits by choice, or what the model's setting states.
    """

    policy: ExecutionPolicy
    fixed: Mapping[str, bool]
    measured: Mapping[str, bool]
    choice: Choice | None = None
    weights: Choice | None = None
    is_widened: bool = False
    states_weights: bool = False

    @property
    def candidates(self) -> list[str]:
        """Fields that are still to be measured."""
        if self.choice is None:
            return []
        names = [name for name in self.policy.candidates if name not in self.fixed and name not in self.choice.speedups]
        return [name for name in names if name != WEIGHTS]

    @property
    def measures_weights(self) -> bool:
        """Whether the weights' format is still to be measured."""
        return self.weights is not None and WEIGHTS not in self.weights.speedups

    def facts(self, fitting: ExecutionPolicy) -> PolicyFacts:
        """Facts of the policy that the self-check has left."""
        return PolicyFacts(
            **{name: getattr(fitting, name) for name in POLICY_FIELDS},
            weights=fitting.weights.name.lower(),
            fixed=(*self.fixed, *(["weights"] if self.states_weights else [])),
            measured=(*self.measured, *(["weights"] if self._has_measured_weights else [])),
        )

    @property
    def _has_measured_weights(self) -> bool:
        return self.weights is not None and self.weights.fields.get(WEIGHTS) == self.is_widened


class Policies:
    """Policies of the models of one process. kept: choices of measurements, None measures nothing."""

    def __init__(self, device_policy: ExecutionPolicy, kept: KeptChoices | None = None) -> None:
        self._device_policy = device_policy
        self._kept = kept

    def find(self, spec: ModelSpec) -> ModelPolicy:
        """The policy that a model is to be loaded with. Raises LoadFailed for fields that contradict each other."""
        choice = self._choice(spec, choice_name)
        policy, measured = self._device_policy, dict(choice.fields) if choice else {}
        measured.pop(WEIGHTS, None)
        try:
            policy = policy.with_fields(measured)
        except ValueError as error:  # of another program
            log.debug("%s: what was measured is left out: %s", spec.key, error)
            choice, measured = replace(choice, fields={}, speedups={}) if choice else None, {}
        try:
            policy = policy.with_fields(spec.policy)
        except ValueError as error:
            raise LoadFailed(spec.key, f"its policy can't be had: {error}") from None
        return ModelPolicy(
            policy,
            spec.policy,
            {name: value for name, value in measured.items() if name not in spec.policy},
            choice,
            self._weights(spec),
            spec.is_widened,
            states_weights=spec.weights != "auto" and not spec.is_widened,
        )

    def for_estimate(self, spec: ModelSpec) -> ExecutionPolicy:
        """The device's policy, with what was measured of the format of a model's weights."""
        choice = self._weights(spec)
        if choice is None or WEIGHTS not in choice.fields:
            return self._device_policy
        return replace(self._device_policy, widen_weights="always" if choice.fields[WEIGHTS] else "never")

    def keep(self, spec: ModelSpec, before: Choice, result: Result) -> None:
        """Keep what was measured, with what was known before."""
        self._keep(spec, choice_name, before, result)

    def keep_weights(self, spec: ModelSpec, before: Choice, result: Result) -> None:
        """The same of the weights' format."""
        self._keep(spec, weights_name, before, result)

    def _keep(self, spec: ModelSpec, naming: Naming, before: Choice, result: Result) -> None:
        if self._kept:
            fields, speedups = {**before.fields, **result.fields}, {**before.speedups, **result.speedups}
            name = naming(spec, self._config(spec), self._device_policy)
            self._kept.store(name, replace(before, fields=fields, speedups=speedups))

    def _weights(self, spec: ModelSpec) -> Choice | None:
        is_free = spec.weights == "auto" or spec.is_widened
        can_choose = WEIGHTS in self._device_policy.candidates and is_free and not spec.shard
        return self._choice(spec, weights_name) if can_choose else None

    def _choice(self, spec: ModelSpec, naming: Naming) -> Choice | None:
        if self._kept is None:
            return None
        try:
            config = self._config(spec)
            known = self._kept.find(naming(spec, config, self._device_policy))
            return known or Choice(model_shape(config), device.describe().name)
        except Exception as error:  # a broken model can raise anything; the load will report it
            log.debug("%s: nothing is measured: %s", spec.key, error)
            return None

    def _config(self, spec: ModelSpec) -> Mapping[str, Any]:
        return sources.checkpoint_metadata(spec.source, self._device_policy.weights).config


def choice_name(spec: ModelSpec, config: Mapping[str, Any], policy: ExecutionPolicy, code: str = "") -> str:
    """Name of what is measured for a model of this config.json under the policy of a device.

    code: version of all that computes; by default the present one.
    """
    kv = (spec.kv_bits, spec.kv_group_size) if spec.kv_bits else None
    parts = (policy.with_weights(spec.weights), kv, spec.adapter is not None, sorted(spec.policy.items()))
    return _name(config, code, *parts)


def weights_name(spec: ModelSpec, config: Mapping[str, Any], policy: ExecutionPolicy, code: str = "") -> str:
    """Name of what is measured of its weights' format, whatever format it is loaded in, and however it is computed."""
    return _name(config, code, WEIGHTS)


def _name(config: Mapping[str, Any], code: str, *parts: object) -> str:
    digest = hashlib.sha256((code or code_version()).encode())
    shape = {name: value for name, value in config.items() if name not in _NO_SHAPE}
    for part in (device.describe(), sorted(environment()), json.dumps(shape, sort_keys=True, default=str), *parts):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:40]


def model_shape(config: Mapping[str, Any]) -> str:
    """A model in few words: "llama, 16 layers of 2048, 4 bits"."""
    layers, width = (first_stated([config], keys) for keys in (LAYER_KEYS, WIDTH_KEYS))
    quantization = config.get("quantization")
    bits = quantization.get("bits") if isinstance(quantization, Mapping) else None
    text = f"{config.get('model_type', 'unknown')}, {layers} layers of {width}"
    return f"{text}, {bits} bits" if bits else text
