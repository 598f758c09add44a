"""Wire dialects: what requests and responses look like. Pure: no HTTP, no MLX."""
