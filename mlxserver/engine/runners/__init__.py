"""Kinds of models: how a loaded one is put together, and how its requests become sequences."""
