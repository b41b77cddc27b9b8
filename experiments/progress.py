"""What a user sees while something long runs: of a sweep its cells and the present one's steps, or a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.store import Result


class Bar:
    """Told of every cell and step; shows them while entered."""

    def __init__(self, console: Console, cells: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.console = console
        self.cells = self.progress.add_task("cells", total=cells, note="", visible=cells > 1)
        self.steps = self.progress.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.update(self.steps, visible=False)
        self.progress.stop()

    def started(self, name: str) -> None:
        self.progress.reset(self.steps, description=name, total=None, note="", visible=True)

    def step(self, step: int, total: int | None, loss: float) -> None:
        self.progress.update(self.steps, completed=step, total=total, note=f"loss {loss:.3f}")

    def kept(self, count: int) -> None:
        """Cells that had finished before."""
        self.progress.update(self.cells, completed=count, note=f"{count} kept from before" if count else "")

    def ended(self, result: Result) -> None:
        self.progress.advance(self.cells)
        if result.status == "failed":
            self.console.print(f"[red]{result.name} failed:[/red] {result.reason}", soft_wrap=True)


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """One line that moves on with each of `total` steps; call what this gives with a note."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, note="")
        yield lambda note: progress.update(task, advance=1, note=note)
