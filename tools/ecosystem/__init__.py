"""Round trips with the clients that people use (python -m tools.ecosystem)."""
