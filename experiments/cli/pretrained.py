"""Commands on pretrained pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from experiments.cli.shell import AsJson, Plugin, app, console, errors, load_plugins, unwritable
from experiments.config.names import misspelt_match, misspelt_methods, parse, parse_method, parse_methods
from experiments.escape import for_terminal as escape
from sparse_zoo.errors import refuse

if TYPE_CHECKING:
    from experiments.inspection.pretrained import Compared

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


Size = Annotated[str, typer.Option(help="frames x height x width of the videos.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")]


def requested(
    size: str, steps: int, guidance: float = 5.0, seed: int = 0, shots: str | None = None
) -> tuple[list[str], dict[str, Any]]:
    """What a pipeline is asked for, as fields of `Request`, and why it cannot be."""
    sizes = size.split("x")
    fine = len(sizes) == 3 and all(x.isdigit() and int(x) for x in sizes)
    reasons = [] if fine else [f"--size must be frames x height x width: 81x480x832; got {size!r}"]
    lengths = shot_lengths(shots)
    sizes = sizes if fine else ["1", "1", "1"]
    names = dict(zip(("frames", "height", "width"), map(int, sizes), strict=True))
    return reasons, {**names, "steps": steps, "guidance": guidance, "seed": seed, "shots": lengths}


@app.command(epilog="Example: [bold]zoo compare --methods moc:top_k=5,radial --model wan --prompts prompts.txt[/bold]")
def compare(
    model: Model,
    prompts: Prompts,
    methods: Annotated[
        list[str],
        typer.Option(help="METHOD[:key=value,...],METHOD,...; may be repeated. dense is always there."),
    ],
    match: Annotated[str | None, typer.Option(help="Solve each method's knob for this: density=0.2.")] = None,
    size: Size = "81x480x832",
    steps: Annotated[int, typer.Option(min=1, help="Noise steps.")] = 50,
    guidance: Guidance = 5.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    shots: Shots = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and its videos.")] = Path("compare"),
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Sample a pretrained model with several methods from the same noise and compare the videos with dense attention.

    Writes a page with the videos side by side. PSNR, SSIM and LPIPS are against dense attention; consistency is that of
    features of EfficientNet-Lite0 over the frames of a shot and between shots. A measure whose package or weights are
    not here is left out, and a line says why. The exit code is 1 if a method failed.
    """
    asked = parse_methods(methods)
    reasons, request_of = requested(size, steps, guidance, seed, shots)
    reasons += misspelt_methods(asked, plugins=bool(plugin)) + misspelt_match(match)
    refuse("zoo compare", reasons + unwritable("--out", out, folder=True))
    load_plugins(plugin)
    import sparse_zoo as zoo
    from experiments.config.budget import Budget
    from experiments.inspection import pretrained

    for name, _ in asked:
        zoo.get(name)
    budget = None if match is None else Budget.of(dict([parse(match)]))
    lines = pretrained.read_prompts(prompts)
    request = pretrained.Request(**request_of)
    pipe = pretrained.load_pipeline(model)
    rows, notes = pretrained.compare(pipe, lines, asked, request, out, budget, _dim)
    page = pretrained.write_page(rows, lines, request, out, notes)
    if as_json:
        print(
            json.dumps(json.loads((out / "compare.json").read_text(encoding="utf-8")) | {"page": str(page.absolute())})
        )
    else:
        console.print(_compared(rows))
        console.print(f"page: {escape(str(page.absolute()))}", soft_wrap=True)
    for line in notes:
        _dim(line)
    for row in rows:
        if row.failed is not None:
            errors.print(f"{escape(row.label)} failed: {escape(row.failed)}", soft_wrap=True)
    if any(row.failed is not None for row in rows):
        raise typer.Exit(1)


def _dim(line: str) -> None:
    errors.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)


def _compared(rows: Sequence[Compared]) -> Table:
    """Methods and what was measured of them; a measure that no method has is no column."""
    table = Table(box=None, pad_edge=False)
    columns: list[tuple[str, Callable[[Compared], str]]] = [
        ("density", lambda row: f"{100 * row.density:.1f} %"),
        ("PSNR", lambda row: "–" if row.psnr is None else f"{row.psnr:.2f}"),
        ("SSIM", lambda row: _four(row.ssim)),
        ("LPIPS", lambda row: _four(row.lpips)),
        ("frames alike", lambda row: _four(row.frame_consistency)),
        ("shots alike", lambda row: _four(row.shot_consistency)),
        ("seconds", lambda row: f"{row.seconds:.2f}"),
    ]
    done = [row for row in rows if row.failed is None]
    columns = [(name, shown) for name, shown in columns if name == "PSNR" or any(shown(row) != "–" for row in done)]
    table.add_column("method")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for row in done:
        table.add_row(escape(row.label), *(shown(row) for _, shown in columns))
    return table


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def sampled_pretrained(
    run: Path | None,
    model: Path | None,
    prompts: Path | None,
    method: str | None,
    request_of: tuple[list[str], dict[str, Any]],
    out: Path | None,
    not_for_it: Sequence[str],
    plugin: Sequence[Path],
    as_json: bool,
) -> None:
    """`zoo sample --model`, and `zoo sample RUN --prompts` of a run that trained a pretrained model."""
    asked = None if method is None else parse_method(method)
    reasons, request_fields = request_of
    refuse(
        "zoo sample",
        [
            "give either RUN or --model, not both" if run is not None and model is not None else "",
            "give RUN, a run's folder, or --model with --prompts" if run is None and model is None else "",
            "--model needs --prompts, a text file with one prompt a line" if prompts is None else "",
            "--method is for --model; a run has the methods that it was trained with"
            if method is not None and model is None
            else "",
            f"not for a pretrained model: {', '.join(not_for_it)}" if not_for_it else "",
            *(misspelt_methods([asked], plugins=bool(plugin)) if asked else []),
            *reasons,
        ],
    )
    load_plugins(plugin)
    from experiments.inspection import pretrained

    lines = pretrained.read_prompts(prompts or Path())
    request = pretrained.Request(**request_fields)
    if model is not None:
        name, given = asked or ("dense", {})
        pipe = pretrained.load_pipeline(model)
        row, *_ = pretrained.sample_method(pipe, lines, name, given, request, out or Path("samples"), _dim)
    else:
        assert run is not None
        pipe, bridge, step = pretrained.load_trained(run)
        folder = (run if run.is_dir() else run.parents[1]) / f"samples-{step}"
        row, *_ = pretrained.sample_attached(pipe, bridge, lines, request, out or folder, _dim)
    if as_json:
        made = {"method": row.method, "settings": row.settings, "density": row.density, "seconds": row.seconds}
        videos = [{"prompt": text, "file": file} for text, file in zip(lines, row.videos, strict=True)]
        print(json.dumps({**made, "videos": videos}))
        return
    console.print(f"{escape(row.label)}: density {100 * row.density:.1f} %, {row.seconds:.2f} s a video")
    for text, file in zip(lines, row.videos, strict=True):
        console.print(f"{escape(file)}: {escape(text)}", soft_wrap=True)


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

    reasons, request_fields = requested(size, steps, shots=shots)
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
            *reasons,
        ],
    )
    request = pretrained.Request(**request_fields)
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
