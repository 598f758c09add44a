"""Choosing the next token: samplers, log-probabilities, constraints, grammars."""
