"""Model code of mlx-lm and mlx-vlm, which imports functions by name: other ones are put in their places."""

from __future__ import annotations

import sys

MLX_LM, MLX_VLM = "mlx_lm.models.", "mlx_vlm.models."


def rebind(name: str, former: object, own: object, packages: tuple[str, ...] = (MLX_LM,)) -> None:
    """Have the modules of packages, as far as they are imported, find `own` under a name that is `former` in them."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(packages) and vars(module).get(name) is former:
            setattr(module, name, own)
