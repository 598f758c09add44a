"""The wire: what an OpenAI-compatible request and response look like. Pure, no I/O, imports nothing of ours."""
