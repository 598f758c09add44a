"""Process that converts a GGUF file by gguf2mlx.

Run: python -m mlxserver.engine.loading.gguf_converter FORM, and the options of gguf2mlx. FORM: gguf2mlx, or keep-blocks
for what native kernels on a CPU compute with (gguf_blocks.py).
"""

from __future__ import annotations

import sys

UNUSED = ("mistral_common", "mlx_lm")  # which gguf and gguf2mlx import where they are: seconds, and no use here


def main(arguments: list[str]) -> None:
    """The command line. Ends with status 1, and the reason as the last line, if the file can't be converted."""
    form, *options = arguments
    sys.modules.update(dict.fromkeys(UNUSED))  # type: ignore[arg-type]
    from gguf2mlx import gguf2mlx

    from mlxserver.engine.loading import gguf_blocks, gguf_conversion

    gguf_conversion.hasten()
    if form == "keep-blocks":
        gguf_blocks.extend()
    gguf2mlx.main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
