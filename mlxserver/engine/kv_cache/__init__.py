"""KV cache: slots of running sequences, and the prefix cache."""
