"""Round trips with widely used clients (python -m tools.ecosystem)."""
