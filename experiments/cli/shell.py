"""What all commands share: the application, its consoles and its refusals, and the options that many take."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleDimensions
from typer.core import TyperGroup

from experiments.escape import for_terminal as escape
from experiments.execution import signals
from experiments.redact import redact, redacted_messages
from experiments.tracking.store import home
from sparse_zoo.errors import ZooError

# Read when torch is first imported. OpenMP's threads spin while they wait; where other programs want the same cores, a
# step took 10 times as long for it. Spinning for a short time only costs nothing where they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Read when torch is first imported: its profiler, which counts memory for zoo bench, would tell of its every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Why a path cannot be read or written: no fault of the program's, so one line and no traceback.
NO_PLACE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)

PICTURES = (".png", ".svg", ".pdf")  # of what matplotlib writes, what is good for pages and papers

PIPED = 1000  # columns where there is no terminal: no table, number or advice is cut for want of room
NARROWEST = 80  # columns of tables: rich would leave columns out of narrower ones, a terminal breaks the lines


class Screen(Console):
    """A console as wide as its terminal or as $COLUMNS says; a file or a pipe has no edge.

    On stderr, where progress moves, it is as narrow as the terminal.
    """

    @property  # type: ignore[misc]  # rich's has a setter, which nothing here uses
    def size(self) -> ConsoleDimensions:
        """Columns and rows."""
        found = super().size
        if not self.is_terminal and not os.environ.get("COLUMNS"):
            return ConsoleDimensions(PIPED, found.height)
        return found if self.stderr else ConsoleDimensions(max(found.width, NARROWEST), found.height)


console = Screen(emoji=False)  # a name such as a:bomb:b stays text
errors = Screen(stderr=True, emoji=False)


class Notes(logging.Handler):
    """Shows what the data leaves out, each line once: a sweep sets up the same data for every cell."""

    def __init__(self) -> None:
        """Start with no line shown."""
        super().__init__()
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, unless its line was shown before."""
        line = redact(record.getMessage())
        if line not in self.shown:
            self.shown.add(line)
            errors.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)


class Group(TyperGroup):
    """Commands that show a refusal as one message, with exit code 2 and no traceback, and that end on signals."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises `typer.Exit` with code 2 for wrong use."""
        notes = Notes()
        logging.getLogger("datamodules").addHandler(notes)
        try:
            with redacted_messages(), signals.caught():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(signals.exit_code(error)) from error
        except UnicodeEncodeError as error:  # of a file's name
            cannot = f"{error.object!r} cannot be written in the encoding of this locale, {error.encoding}"
            raise refused(f"{cannot}; give the command with PYTHONUTF8=1, or set LC_ALL=C.UTF-8") from error
        except ZooError as error:
            raise refused(str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
                raise
            raise refused(f"more memory is needed than there is: {' '.join(str(error).split())}") from error
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise
            raise refused(f"{error}{_where_runs_are(error)}") from error


def _where_runs_are(error: OSError) -> str:
    """Advice on the folder of runs, unless the error is about a file elsewhere, which the command line names."""
    if isinstance(error.filename, str):
        path = Path(error.filename).absolute()
        if not path.is_relative_to(home()) and not home().is_relative_to(path):
            return ""
    return f"; runs are kept in {home()}, or where $ZOO_HOME says"


def refused(message: str) -> typer.Exit:
    """Print a refusal; the exit to be raised."""
    errors.print(f"[bold red]Error:[/bold red] {escape(redact(message))}", soft_wrap=True)
    return typer.Exit(2)


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


def unfit_picture(option: str, path: Path | None) -> list[str]:
    """Return why a file cannot take a picture, before what it is to show is computed: its name says the format."""
    fit = path is None or (path.suffix.lower() in PICTURES and not path.is_dir())
    wrong = [f"{option} must be a file whose name ends in {', '.join(PICTURES)}, got {str(path)!r}"]
    return unwritable(option, path) if fit else wrong


def unwritable(option: str, path: Path | None, *, folder: bool = False) -> list[str]:
    """Return why a file, or a `folder`, cannot be written, before what it is to hold is computed."""
    if path is None:
        return []
    if path.exists() and path.is_dir() != folder:
        return [f"{option} must be a {'folder' if folder else 'file'}, got {str(path)!r}, which is none"]
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if there != path and not there.is_dir():
        return [f"{option} {str(path)!r} lies in {str(there)!r}, which is no folder"]
    return (
        [] if os.access(there, os.W_OK) else [f"{option} {str(path)!r} cannot be written: no right to {str(there)!r}"]
    )


def load_plugins(paths: Sequence[Path], *, data: bool = False) -> None:
    """Import the user's files; with `data` they may hold a datamodule and no method."""
    if paths:
        import sparse_zoo as zoo
        from sparse_zoo.registry import import_file

        for path in paths:
            (import_file if data else zoo.load_plugin)(path)


def plain(value: Any) -> Any:
    """Return a setting's value as YAML shows it: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value
