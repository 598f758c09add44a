"""Some seconds of what `make soak` does for minutes."""

from tools import soak


def test_a_short_soak_keeps_every_promise(capsys):
    """Of the memory it sees only gross faults: in so short a time the process has not settled."""
    assert soak.main(["--minutes", "0.1", "--growth", "1.5"]) == 0, capsys.readouterr().out
