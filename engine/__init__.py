"""Everything that touches MLX or runs on an engine thread. It knows nothing of HTTP."""

from engine import blas

blas.preload()  # before any module of this package can import mlx.core
