"""Native kernels: sources, and build.py, which compiles them at set-up."""
