"""Measurements side by side: this server and mlx_lm.server, the same weights, the same load, one run."""
