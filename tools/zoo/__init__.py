"""Model zoo: every architecture of mlx-lm, tiny and random, in the engine beside mlx-lm alone."""
