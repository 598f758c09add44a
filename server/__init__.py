"""The HTTP server's rooms: where the wire's vocabulary (protocol/) and the engine's (engine/types.py) meet."""
