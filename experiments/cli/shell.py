"""What all commands share: the application, its consoles and its refusals, and the options that many take."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

# Read when torch is first imported. OpenMP's threads spin while they wait; where other programs want the same cores, a
# step took 10 times as long for it. Spinning for a short time only costs nothing where they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Read when torch is first imported: its profiler, which counts memory for zoo bench, would tell of its every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Why a folder cannot be written: no fault of the program's, so one line and no traceback.
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)

console = Console()
errors = Console(stderr=True)


class Group(TyperGroup):
    """Commands whose refusals are one clear message and exit code 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            from sparse_zoo.errors import ZooError

            if not isinstance(error, ZooError):
                raise
            errors.print(f"[bold red]Error:[/bold red] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except OSError as error:
            from experiments.store import home

            if error.errno not in NO_PLACE:
                raise
            told = f"{error}; runs lie in {home()}, or where $ZOO_HOME says"
            errors.print(f"[bold red]Error:[/bold red] {escape(told)}", soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train video diffusion transformers with interchangeable sparse attention; compare what each costs and gives.",
)

Plugin = Annotated[
    list[Path], typer.Option("--plugin", help="Python file with methods of your own, usable at once; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def load_plugins(paths: Sequence[Path]) -> None:
    if paths:
        import sparse_zoo as zoo

        for path in paths:
            zoo.load_plugin(path)


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
