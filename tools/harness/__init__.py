"""Parts that tests and tools share: small models, a running server, a terminal, ranks."""
