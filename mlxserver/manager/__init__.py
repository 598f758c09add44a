"""The machinery of model_manager.py: registry, lifecycle, memory budget, eviction."""
