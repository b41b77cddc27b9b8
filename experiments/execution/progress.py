"""Progress bars: the cells of a sweep and the steps of the running ones, or a plain count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.escape import for_terminal as escape
from experiments.escape import visible
from experiments.tracking.store import Result


class Bar:
    """Receives the progress of every cell and step; shows it while entered."""

    def __init__(self, console: Console, cells: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self.console = console
        self.cells = self.progress.add_task("cells", total=cells, note="", visible=cells > 1)
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.running):
            self._end(name)
        self.progress.stop()

    def started(self, name: str) -> None:
        """Add a bar for a cell that has started."""
        self.running[name] = self.progress.add_task(visible(name), total=None, note="")

    def step(self, name: str, step: int, total: int | None, note: str) -> None:
        """Move a cell's bar to `step` of `total` (None: not known), and show the note beside it."""
        self.progress.update(self.running[name], completed=step, total=total, note=visible(note))

    def kept(self, count: int) -> None:
        """Count cells that had finished before this sweep began, and say so beside the bar."""
        self.progress.update(self.cells, completed=count, note=f"{count} kept from before" if count else "")

    def ended(self, result: Result) -> None:
        """Count a cell that ended with a result, here or elsewhere; print the reason if it failed."""
        self._end(result.name)
        self.progress.advance(self.cells)
        if result.status == "failed":
            self.console.print(
                f"[red]{escape(result.name)} failed:[/red] {escape(result.reason or '')}", soft_wrap=True
            )

    def dropped(self, name: str, why: str) -> None:
        """Remove the bar of a cell that ended without a result, and print why."""
        self._end(name)
        self.console.print(f"[red]{escape(name)}:[/red] {escape(why)}", soft_wrap=True)

    def note(self, line: str) -> None:
        """Print a line, dimmed, above the bars."""
        self.console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)

    def _end(self, name: str) -> None:
        if name in self.running:
            self.progress.remove_task(self.running.pop(name))


@contextmanager
def counting(console: Console, what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress line over `total` steps (None: not known).

    It yields a function that advances the line: call it with a note, and with 0 to show the note alone.
    """
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, note="")

        def advance(note: str, steps: int = 1) -> None:
            progress.update(task, advance=steps, note=visible(note))

        yield advance
