"""Runs models. Knows no HTTP and no dialect."""
