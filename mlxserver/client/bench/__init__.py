"""Benchmarks of a server: figures under load, and interference of two models."""
