"""Commands on training data: check a manifest, encode it into latents."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from experiments.cli.shell import AsJson, app, console, errors
from experiments.escape import for_terminal as escape

data = typer.Typer(no_args_is_help=True, help="Look at training data before it is used.")
app.add_typer(data, name="data")

ManifestFile = Annotated[str, typer.Argument(help="A .jsonl, .csv or .parquet file, or a folder of videos.")]


@data.command(epilog="Example: [bold]zoo data check films.jsonl[/bold]")
def check(manifest: ManifestFile, as_json: AsJson = False) -> None:
    """List what in a manifest cannot be used, and why, before hours are spent on it.

    Reads every row, opens every video and decodes its first frame. The exit code is 1 if any row cannot be used.
    """
    from datamodules.checking import check as look
    from datamodules.manifest import Manifest
    from experiments.execution.progress import counting

    with counting(errors, "rows", None) as told:
        found = look(Manifest(manifest), lambda: told(""))
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        for note in found.notes:
            errors.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
        for fault in found.faults:
            console.print(f"[red]{escape(str(fault))}[/red]", soft_wrap=True)
        table = Table(box=None, pad_edge=False, show_header=False)
        sizes = sorted(found.sizes.items(), key=lambda item: -item[1])
        unknown = f" and {found.unknown} videos whose length is not known" if found.unknown else ""
        for name, value in (
            ("rows", str(found.rows)),
            ("can be used", str(found.usable)),
            ("cannot be used", str(len(found.faults))),
            ("length", f"{found.seconds / 3600:.2f} hours{unknown}"),
            ("shots given", str(found.shots)),
            ("captions", str(found.captions)),
            ("sizes", ", ".join(f"{size} ({count})" for size, count in sizes[:5])),
        ):
            table.add_row(name, escape(value))
        console.print(table)
    if found.faults or not found.rows:
        raise typer.Exit(1)
