"""Commands on pretrained pipelines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from experiments.cli.shell import AsJson, Plugin, app, console, errors, load_plugins
from experiments.config.names import misspelt_match, misspelt_methods, parse, parse_method
from experiments.escape import for_terminal as escape
from sparse_zoo.errors import refuse

Model = Annotated[Path, typer.Option("--model", help="Folder of a diffusers pipeline on disk.")]
Prompts = Annotated[Path, typer.Option("--prompts", help="A text file, one prompt a line.")]
Shots = Annotated[str | None, typer.Option(help="Latent frames of each shot: 6,6,9. One shot if not given.")]


def shot_lengths(given: str | None) -> tuple[int, ...] | None:
    """Return the latent frames of each shot, of a text such as "6,6,9"; raises `ZooError` for another text."""
    if given is None:
        return None
    parts = given.split(",")
    refuse(
        "--shots",
        [] if all(x.strip().isdigit() for x in parts) else [f"must be whole numbers: 6,6,9; got {given!r}"],
    )
    return tuple(map(int, parts))


@app.command(epilog="Example: [bold]zoo compare moc:top_k=5 radial --model wan --prompts prompts.txt[/bold]")
def compare(
    methods: Annotated[list[str], typer.Argument(help="METHOD[:key=value,...]; dense is always there.")],
    model: Model,
    prompts: Prompts,
    match: Annotated[str | None, typer.Option(help="Solve each method's knob for this: density=0.2.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of video.")] = 81,
    height: Annotated[int, typer.Option(min=1, help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(min=1, help="Pixels.")] = 832,
    steps: Annotated[int, typer.Option(min=1, help="Noise steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    shots: Shots = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and its videos.")] = Path("compare"),
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Sample a pretrained model with several methods from the same noise and compare the videos with dense attention.

    Writes a page with the videos side by side. PSNR and SSIM are against dense attention. The exit code is 1 if a
    method failed.
    """
    asked = [parse_method(text) for text in methods]
    refuse("zoo compare", misspelt_methods(asked, plugins=bool(plugin)) + misspelt_match(match))
    load_plugins(plugin)
    import sparse_zoo as zoo
    from experiments.config.budget import Budget
    from experiments.inspection import pretrained

    for name, _ in asked:
        zoo.get(name)
    lengths = shot_lengths(shots)
    budget = None if match is None else Budget.of(dict([parse(match)]))
    lines = pretrained.read_prompts(prompts)
    request = pretrained.Request(frames, height, width, steps, guidance, seed, lengths)
    pipe = pretrained.load_pipeline(model)
    rows = pretrained.compare(
        pipe, lines, asked, request, out, budget, lambda note: errors.print(f"[dim]{escape(note)}[/dim]")
    )
    page = pretrained.write_page(rows, lines, request, out)
    if as_json:
        print(
            json.dumps(json.loads((out / "compare.json").read_text(encoding="utf-8")) | {"page": str(page.absolute())})
        )
    else:
        table = Table(box=None, pad_edge=False)
        for name in ("method", "density", "PSNR", "SSIM", "seconds"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in rows:
            if row.failed is None:
                noise = "–" if row.psnr is None else f"{row.psnr:.2f}"
                like = "–" if row.ssim is None else f"{row.ssim:.4f}"
                table.add_row(escape(row.label), f"{100 * row.density:.1f} %", noise, like, f"{row.seconds:.2f}")
        console.print(table)
        console.print(f"page: {escape(str(page.absolute()))}", soft_wrap=True)
    for row in rows:
        if row.failed is not None:
            errors.print(f"{escape(row.label)} failed: {escape(row.failed)}", soft_wrap=True)
    if any(row.failed is not None for row in rows):
        raise typer.Exit(1)


def captured_pretrained(
    run: Path | None,
    overrides: Sequence[str] | None,
    model: Path | None,
    prompts: Path | None,
    size: str,
    steps: int,
    shots: str | None,
    layers: str | None,
    times: Sequence[float],
    out: Path,
    as_json: bool,
) -> None:
    """`zoo capture --model`: what dense attention is given while a pretrained pipeline samples."""
    from experiments.inspection import pretrained
    from experiments.inspection.capture import save
    from experiments.inspection.ladder import TIMES, layer_numbers

    sizes = size.split("x")
    refuse(
        "zoo capture",
        [
            "give either RUN or --model, not both" if run is not None and model is not None else "",
            "give RUN, a run's folder, or --model with --prompts" if run is None and model is None else "",
            "--model needs --prompts, a text file with one prompt a line"
            if model is not None and prompts is None
            else "",
            "--prompts is for --model" if model is None and prompts is not None else "",
            f"key=value is for RUN, got {' '.join(overrides)}" if overrides else "",
            ""
            if len(sizes) == 3 and all(x.isdigit() and int(x) for x in sizes)
            else f"--size must be frames x height x width: 81x480x832; got {size!r}",
        ],
    )
    frames, height, width = map(int, sizes)
    request = pretrained.Request(frames, height, width, steps, shots=shot_lengths(shots))
    lines = pretrained.read_prompts(prompts or Path())
    pipe = pretrained.load_pipeline(model or Path())
    chosen = None if layers is None else layer_numbers(layers)
    found = pretrained.capture(
        pipe, lines, request, chosen, tuple(times) or TIMES, lambda note: errors.print(f"[dim]{escape(note)}[/dim]")
    )
    path = save(out, found).absolute()
    if as_json:
        print(json.dumps({"file": str(path), "bytes": path.stat().st_size, "calls": len(found)}))
        return
    console.print(f"{len(found)} calls, {path.stat().st_size / 2**20:.1f} MiB: {escape(str(path))}", soft_wrap=True)
