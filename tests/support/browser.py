"""A real Chromium, driven by Playwright: Debian's package, which is installed where the tests run as root."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
AXE = "axe-core@4.14.1"


@contextmanager
def alone(name):
    """One process at a time, of all that run tests."""
    with (Path(tempfile.gettempdir()) / f"mlx-tests-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def chromium():
    """The browser of this machine; None where Playwright is to use one of its own."""
    if (found := _find()) or os.getuid() or not shutil.which("apt-get"):
        return found
    with alone("chromium"):
        if not _find():
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"]
            for command in (["apt-get", "update", "-q"], install):
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return _find()


def axe_source():
    """The script of axe-core, from the npm registry."""
    with alone("axe"), tempfile.TemporaryDirectory() as folder:
        kept = Path(tempfile.gettempdir()) / f"{AXE}.min.js"
        if not kept.exists():
            subprocess.run(["npm", "pack", AXE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            (packed,) = Path(folder).glob("*.tgz")
            shutil.unpack_archive(packed, folder, filter="data")
            shutil.copy(Path(folder) / "package" / "axe.min.js", kept)
        return kept.read_text()


@contextmanager
def running_browser():
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def _find():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
