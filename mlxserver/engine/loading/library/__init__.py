"""Library: the models that are on this machine, found in the folders where programs keep them."""
