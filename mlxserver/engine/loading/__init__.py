"""Loading of models: sources, downloads, conversion, estimates, weights."""
