"""From a source to a model in memory: download, convert, estimate, read, prepare."""
