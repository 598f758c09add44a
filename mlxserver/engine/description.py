"""Description of a checkpoint: what its files state, whether the model is loaded or not. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint on this machine. What is not known is empty, or 0.

    architecture: mlx-lm's name of it ("llama"). parameters: number of weights. quantization: "Q4", "BF16" and so on.
    context: the longest that its makers state, in tokens. stored_bytes: size of the weights in their files. template:
    the chat template, in Jinja. modified: time of the last change of its configuration, seconds since 1970.
    """

    architecture: str = ""
    parameters: int = 0
    quantization: str = ""
    context: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    width: int = 0
    vocab: int = 0
    stored_bytes: int = 0
    template: str = ""
    modified: float = 0.0

    @property
    def may_think(self) -> bool:
        """Whether the chat template speaks of reasoning, by any of the names that it has."""
        return "think" in self.template.lower() or "reasoning" in self.template.lower()
