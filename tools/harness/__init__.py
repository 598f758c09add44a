"""Real parts for tests and tools: model makers, a running server, a terminal, ranks."""
