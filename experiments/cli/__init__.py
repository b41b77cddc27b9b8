"""The `zoo` command. Heavy imports wait until a command needs them, so that `zoo list` answers at once."""

from experiments.cli import runs, trained, methods  # isort: skip  # each adds its commands, which help shows in this order
from experiments.cli.shell import app

__all__ = ["app", "main", "methods", "runs", "trained"]


def main() -> None:
    """The console script."""
    app()
