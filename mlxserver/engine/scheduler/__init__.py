"""Continuous batching: admission, chunked prefill, decode steps, preemption."""
