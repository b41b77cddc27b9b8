"""Commands on training data: check a manifest, encode it into latents."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from experiments.cli.shell import AsJson, app, console, errors
from experiments.escape import for_terminal as escape
from sparse_zoo.errors import refuse, unknown

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

    with counting(errors, "rows", None) as advance:
        found = look(Manifest(manifest), lambda: advance(""))
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


def sizes(given: list[str]) -> tuple[tuple[int, int], ...]:
    """Heights and widths of texts such as 480x832."""
    parts = [text.lower().split("x") for text in given]
    bad = [text for text, part in zip(given, parts, strict=True) if len(part) != 2 or not all(map(str.isdecimal, part))]
    refuse("--size", [f"it is HEIGHTxWIDTH in pixels, such as 480x832; got {text!r}" for text in bad])
    return tuple((int(height), int(width)) for height, width in parts)


@app.command(
    epilog="Example: [bold]zoo encode films.jsonl --vae wan --text-encoder wan --out latents --fps 16 --jobs 4[/bold]"
)
def encode(
    manifest: ManifestFile,
    vae: Annotated[Path, typer.Option(help="Folder of a diffusers video VAE, or of a pipeline with one.")],
    text_encoder: Annotated[
        Path,
        typer.Option(help="Folder of a transformers text encoder and its tokenizer, or of a pipeline; or minilm."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; films already in it are not encoded again.")],
    size: Annotated[
        list[str], typer.Option(help="HEIGHTxWIDTH in pixels; may be repeated: a video takes the nearest shape.")
    ] = ["480x832"],  # noqa: B006
    fps: Annotated[float | None, typer.Option(help="Frames a second to keep; the file's own if not given.")] = None,
    max_frames: Annotated[
        int, typer.Option(min=1, help="Frames that are encoded together; a longer shot is cut into parts.")
    ] = 81,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens kept of a caption.")] = 512,
    detector: Annotated[
        str, typer.Option(help="Finds shots where the manifest has no times: content or adaptive.")
    ] = "content",
    threshold: Annotated[float | None, typer.Option(help="Of the detector; its own default if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what is stored: bfloat16, float16 or float32.")] = "bfloat16",
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes at which a shard is finished.")] = 1024,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="So many processes, each with a GPU; with --executor jobs of SLURM, tasks of Ray."),
    ] = 1,
    executor: Annotated[str, typer.Option(help="local; slurm, as an array job; ray, as tasks of Ray.")] = "local",
    slurm: Annotated[
        list[str], typer.Option("--slurm", help="key=value, a parameter of sbatch; may be repeated.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Encode videos shot by shot into VAE latents, and captions into text embeddings, as shards for training.

    If the command is interrupted, give it again: it encodes only the missing films. Several commands may share a
    folder. The exit code is 1 if a row could not be encoded.
    """
    executors = ("local", "slurm", "ray")
    refuse(
        "zoo encode",
        [
            unknown("executor", executor, executors) if executor not in executors else "",
            "--slurm is for --executor slurm" if slurm and executor != "slurm" else "",
        ],
    )
    shapes = sizes(size)
    from datamodules.encoding import Encoding
    from datamodules.manifest import Fault, Manifest, Row
    from experiments.execution.encode import EncodingBar
    from experiments.execution.encode import encode as run
    from experiments.execution.slurm import parameters

    settings = parameters(slurm) if executor == "slurm" else None
    encoding = Encoding(
        out,
        vae,
        text_encoder,
        shapes,
        fps,
        max_frames,
        max_tokens,
        detector,  # type: ignore[arg-type]  # it is checked there
        threshold,
        dtype,  # type: ignore[arg-type]
        shard_mb * 2**20,
    )
    start = time.perf_counter()
    films = Manifest(manifest)
    given = list(films)
    rows, faults = [x for x in given if isinstance(x, Row)], [x for x in given if isinstance(x, Fault)]
    for note in films.notes:
        errors.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    for fault in faults:
        errors.print(f"[red]{escape(str(fault))}[/red]", soft_wrap=True)
    refuse("zoo encode", [] if rows else [f"{manifest} has no row that can be used"])
    try:
        with EncodingBar(errors, len(rows)) as bar:
            outcomes = run(rows, encoding, bar, jobs=jobs, sbatch=settings, ray=executor == "ray")
    except KeyboardInterrupt:
        errors.print("Stopped. Finished films are kept; give the same command to resume", soft_wrap=True)
        raise
    done = [outcome.film for outcome in outcomes if outcome.film is not None]
    failed = [{"line": x.row.line, "video": x.row.name, "reason": x.reason} for x in outcomes if x.film is None]
    failed += [{"line": x.line, "video": x.name, "reason": "; ".join(x.reasons)} for x in faults]
    summary = {
        "folder": str(out.absolute()),
        "films": len(done),
        "shots": sum(len(film.shots) for film in done),
        "bytes": sum(path.stat().st_size for path in out.glob("*.tar")),
        "seconds": round(time.perf_counter() - start, 1),
        "failed": failed,
    }
    if as_json:
        print(json.dumps(summary))
    else:
        console.print(
            f"{summary['films']} films of {summary['shots']} shots; the shards of {escape(str(out.absolute()))} take "
            f"{summary['bytes'] / 1e6:.1f} MB; {summary['seconds']} s",  # type: ignore[operator]
            soft_wrap=True,
        )
    if failed:
        errors.print(f"rows that could not be encoded: {len(failed)}, listed above")
        raise typer.Exit(1)
