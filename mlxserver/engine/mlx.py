"""The one door to MLX: prepares the process, then imports MLX. Modules that compute take `mx` and `nn` from here.

Rule: nothing imports mlx or mlx_lm before this module; ruff sorts its import first, tests/test_architecture.py looks.
"""

from mlxserver.engine.platform import environment

environment.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

__all__ = ["mx", "nn"]
