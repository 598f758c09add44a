"""Parts that the two command-line clients share. Of the server they know the HTTP API and mlxserver.api.sse."""
