"""Everything that touches MLX or runs on an engine thread. It knows nothing of HTTP."""

from engine import environment

environment.prepare()
