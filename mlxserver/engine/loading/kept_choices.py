"""Choices that measurements have made, kept in files between loads and processes.

Rule 1: a file's name is a hash of all that its choice depends on: device, shape of the model, format of its weights and
        of its KV cache, versions (choice_name() in runners/model_policy.py).
Rule 2: what can't be read, or was written in another form, is measured anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlxserver.config.settings import POLICY_FIELDS
from mlxserver.engine.platform.kept_files import KeptFiles

CHOICES = "policies"  # folder in the cache directory
WEIGHTS = "widen_weights"  # beside POLICY_FIELDS, and no field of a model's `policy`: its setting `weights` fixes it
_FORM = 1  # of the files
_FIELDS = {*POLICY_FIELDS, WEIGHTS}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a measurement has chosen. model, device: for people.

    fields: of the policy, by name, that differ from the device's. speedups: of each candidate, by the field that it
    has otherwise, over the policy that was the best before; 0 where it failed. WEIGHTS: of weights in the chosen format
    over the other one.
    """

    model: str
    device: str
    fields: Mapping[str, bool] = field(default_factory=dict)
    speedups: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(text: bytes) -> Choice:
        """The choice in a file. Raises ValueError, KeyError or TypeError if there is none in it."""
        stated = json.loads(text)
        if stated["form"] != _FORM:
            raise ValueError(f"form is {stated['form']!r}")
        fields, speedups = dict(stated["fields"]), dict(stated["speedups"])
        if not all(name in _FIELDS and type(value) is bool for name, value in fields.items()):
            raise ValueError(f"fields are {fields!r}")
        if not all(name in _FIELDS and 0 <= float(ratio) < math.inf for name, ratio in speedups.items()):
            raise ValueError(f"speedups are {speedups!r}")
        return Choice(str(stated["model"]), str(stated["device"]), fields, speedups)

    def __str__(self) -> str:
        parts = []
        for name, ratio in self.speedups.items():
            result = f"{ratio:.2f} times as fast" if ratio else "failed"
            chosen = f"{'on' if self.fields[name] else 'off'}, " if name in self.fields else "unchanged, "
            parts.append(f"{name} {chosen}{result}")
        return f"{self.model}: {'; '.join(parts)}"


class KeptChoices:
    """Files of choices in a directory, which several processes may share (kept_files.py)."""

    def __init__(self, directory: Path, most: int = 256) -> None:
        self._files = KeptFiles(directory, most)

    def find(self, name: str) -> Choice | None:
        """The choice of this name (choice_name()), if there is one."""
        return self._files.read(name, Choice.parse)

    def store(self, name: str, choice: Choice) -> None:
        """Keep a choice, in place of an earlier one."""
        self._files.write(name, {"form": _FORM, **asdict(choice)})

    def all(self) -> Iterator[Choice]:
        """All that are kept, the latest first."""
        return self._files.read_all(Choice.parse)
