"""The `zoo` command. Heavy imports wait until a command needs them, so that `zoo list` answers at once."""

import getpass
import io
import os
import sys
import tempfile
from pathlib import Path

from experiments.cli import runs, trained, pretrained, data, methods  # isort: skip  # each adds its commands, which help shows in this order
from experiments.cli.shell import app

__all__ = ["app", "data", "main", "methods", "pretrained", "runs", "trained"]


def main() -> None:
    """The console script; a sign that the terminal's encoding has not is shown as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    settle_in()
    app()


def settle_in() -> None:
    """Give a user id that the system does not know, as in a container, a home and a name: libraries ask for both."""
    try:
        Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"zoo-home-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid()
        os.environ["HOME"] = str(folder) if mine else tempfile.mkdtemp(prefix="zoo-home-")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
