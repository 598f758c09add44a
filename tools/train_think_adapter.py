"""Training of mlxserver/adapters/smollm2-think, the LoRA adapter that makes the embedded model reason inside <think>.

    python -m tools.train_think_adapter --output DIRECTORY [--steps N]

Rule 1: mlx-lm's own trainer runs in float32, on the examples of tools/think_examples.py.
Rule 2: examples and initial weights come from SEED; the saved files hold no path of this machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mlxserver.engine.mlx import mx

import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.loading.loader import LoadedModel, load
from tools.think_examples import conversations

SEED = 17
LAYERS = 8
LORA: dict[str, Any] = {"rank": 8, "dropout": 0.0, "scale": 20.0}
LEARNING_RATE = 3e-4
BATCH = 4


def run(output: Path, steps: int) -> None:
    """Train for `steps` steps of BATCH examples each, and write the adapter into the directory."""
    mx.random.seed(SEED)
    np.random.seed(SEED)  # the trainer shuffles with it
    loaded = load(ModelSpec("smollm2", "embedded:smollm2"))
    loaded.model.freeze()
    linear_to_lora_layers(loaded.model, LAYERS, LORA)
    output.mkdir(parents=True, exist_ok=True)
    configuration = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": LORA}
    (output / "adapter_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
    train(
        model=loaded.model,
        args=TrainingArgs(
            batch_size=BATCH,
            iters=steps,
            val_batches=4,
            steps_per_eval=100,
            steps_per_save=steps + 1,  # only at the end
            adapter_file=str(output / "adapters.safetensors"),
        ),
        optimizer=optim.Adam(learning_rate=optim.cosine_decay(LEARNING_RATE, steps, end=LEARNING_RATE / 10)),
        train_dataset=_examples(loaded, steps * BATCH, SEED),
        val_dataset=_examples(loaded, 16, SEED + 1),
    )


def _examples(loaded: LoadedModel, count: int, seed: int) -> CacheDataset:
    messages = [{"messages": chat} for chat in conversations(count, seed)]
    return CacheDataset(ChatDataset(messages, loaded.tokenizer, mask_prompt=True))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the LoRA adapter that makes the embedded model think.")
    parser.add_argument("--output", type=Path, default=Path("mlxserver/adapters/smollm2-think"))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    run(options.output, options.steps)


if __name__ == "__main__":
    main()
