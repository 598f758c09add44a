"""Multi-Model MLX Server: one process that serves several local models. Importing it changes nothing in the process."""

__version__ = "1.0.0"
