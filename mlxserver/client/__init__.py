"""What the two command-line clients share. Knows the HTTP API only."""
