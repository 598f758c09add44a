"""Commands of `mlx-server` beside `serve` and `launch`: about models, and about this machine."""
