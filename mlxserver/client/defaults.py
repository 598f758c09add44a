"""What the help texts of all command lines state. Imports nothing: help and wrong usage are answered at once."""

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
EXIT_STATUSES = """exit status:
  0    fine
  1    the server answered with an error, or broke off
  2    wrong usage
  3    no server, or no answer from it
  130  interrupted"""
INTERRUPTED = 130
