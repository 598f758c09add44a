"""Program in a pseudo-terminal, with the screen and the scrollback of a real terminal."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pexpect
import pyte

ROOT = Path(__file__).parent.parent.parent
COLUMNS, ROWS = 100, 40
TIMEOUT = 100.0  # seconds, enough for anything on a busy machine
CTRL_C, CTRL_D, ENTER, ALT_ENTER, TAB, UP = "\x03", "\x04", "\r", "\x1b\r", "\t", "\x1b[A"
SETTINGS = ("NO_COLOR", "FORCE_COLOR", "OPENAI_BASE_URL", "OPENAI_API_KEY")


class Screen(pyte.HistoryScreen):
    """Screen that answers the queries of programs, such as the cursor's position."""

    def __init__(self, answer):
        super().__init__(COLUMNS, ROWS, history=5000)
        self.write_process_input = answer


class Terminal:
    """Running program. Every wait is for text on the screen, never for time."""

    def __init__(self, command, environment, screen):
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env={name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")},
            dimensions=(ROWS, COLUMNS),
            encoding="utf-8",
            codec_errors="replace",
            echo=False,
            timeout=TIMEOUT,
        )
        self.screen = screen(self.child.send)
        self._stream = pyte.Stream(self.screen)

    @property
    def shown(self):
        """All lines so far, the scrollback first."""
        gone = ["".join(line[column].data for column in range(COLUMNS)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self.screen.display])

    def type(self, text):
        self.child.send(text)

    def enter(self, line):
        self.child.send(line + ENTER)

    def expect(self, *texts, within=TIMEOUT):
        """Read until all texts are shown, in this order."""
        self.until(lambda: self._shows(texts), texts, within)

    def until(self, condition, wanted, within=TIMEOUT):
        """Read until the condition is true; its result. wanted: what it is about."""
        deadline = monotonic() + within
        while not (outcome := condition()):
            assert monotonic() < deadline, f"{wanted} not in:\n{self.shown}"
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(), f"the program ended, and {wanted} not in:\n{self.shown}"
        return outcome

    def exit_status(self):
        """Read to the end of the program; its exit status."""
        while True:
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=TIMEOUT))
            except pexpect.EOF:
                self.child.wait()
                return self.child.exitstatus

    def _shows(self, texts):
        rest = self.shown
        for text in texts:
            _, found, rest = rest.partition(text)
            if not found:
                return False
        return True


@contextmanager
def terminal(*arguments, home, screen=Screen, **environment):
    """advanced_client.py on its own terminal, with `home` for its files."""
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    own = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "XDG_STATE_HOME": str(home), "HOME": str(home)}
    shown = Terminal(
        [sys.executable, str(ROOT / "advanced_client.py"), *arguments], inherited | own | environment, screen
    )
    try:
        yield shown
    finally:
        shown.child.close(force=True)
