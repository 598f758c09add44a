"""The one door to MLX: prepares the process, then imports MLX. What computes takes `mx` and `nn` from here.

Rule: nothing imports mlx or mlx_lm before this module; ruff sorts its import first, a test checks it.
"""

from mlxserver.engine.platform import environment

environment.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

__all__ = ["mx", "nn"]
