"""One thread per model, and everything that crosses between it and the event loop."""
