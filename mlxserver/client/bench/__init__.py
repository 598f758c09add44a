"""Measuring a server under load, and what one model's work costs another."""
