"""Endpoints of this server's own: load, unload, reload, tokenize, templates."""
