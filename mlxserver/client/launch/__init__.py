"""Launch: coding agents and other programs, set up for a server."""
