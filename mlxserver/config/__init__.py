"""What may be set. Imports nothing of ours."""
