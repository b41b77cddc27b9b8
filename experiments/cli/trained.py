"""Commands that sample from trained models, measure their attention, and capture and replay its calls; `zoo ui`."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from experiments.cli.pretrained import captured_pretrained, requested, sampled_pretrained
from experiments.cli.shell import AsJson, Plugin, app, console, errors, load_plugins, unfit_picture, unwritable
from experiments.config.names import misspelt_choices, misspelt_match, misspelt_methods, parse, parse_method
from experiments.escape import for_terminal as escape
from experiments.inspection.checkpoint import find
from sparse_zoo.errors import refuse

SHOWN_SWEEPS = 20  # of how many `zoo ui` prints the page

if TYPE_CHECKING:
    from experiments.inspection.sample import Sampled


@app.command(
    epilog="Example: [bold]zoo sample runs/train/moc-0123456789ab data.returns=9 --order shots --context 3[/bold]"
)
def sample(
    run: Annotated[Path | None, typer.Argument(help="A run's folder, or a .ckpt in one; or give --model.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    films: Annotated[int, typer.Option(min=1, help="How many validation films to generate.")] = 4,
    given: Annotated[int, typer.Option(min=0, help="How many first shots of each film are given, not generated.")] = 0,
    order: Annotated[str | None, typer.Option(help="film: all shots at once; shots: one after the other.")] = None,
    context: Annotated[
        int | None, typer.Option(min=0, help="Generate by shots, beside so many earlier ones, chosen by their means.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Euler steps; for a pretrained model noise steps, 50 by default.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Instead of RUN: folder of a diffusers pipeline.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="With --model, or a RUN that trained a pretrained model: one prompt a line.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="With --model: METHOD[:key=value,...]; dense if not given.")
    ] = None,
    size: Annotated[str, typer.Option(help="With --prompts: frames x height x width.")] = "81x480x832",
    guidance: Annotated[float, typer.Option(help="With --prompts: classifier-free guidance; 1 is none.")] = 5.0,
    seed: Annotated[int, typer.Option(help="With --prompts: seed of the noise.")] = 0,
    shots: Annotated[str | None, typer.Option(help="With --prompts: latent frames of each shot: 6,6,9.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for strips and videos; one in the run if not given, with --model `samples`."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", help="Also plot recall against distance and what each shot shows: PNG or SVG."),
    ] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Generate films with a trained model, of more shots than it was trained on if the data has them, and judge them.

    With --prompts, write MP4 videos of a pretrained model, with a method as its attention (--model) or as a run has
    fine-tuned it (RUN).

    What is not asked for is as in the run's config. Measures that begin with whole_ ask whether a film of which no shot
    was given agrees with itself, the others compare generated shots with the true film.
    """
    refuse("zoo sample", unwritable("--out", out, folder=True) + unfit_picture("--plot", picture))
    if model is not None or prompts is not None or run is None:
        given_too = {
            "key=value": bool(overrides),
            "--films": films != 4,
            "--given": given > 0,
            "--plot": picture is not None,
        }
        given_too |= {"--order": order is not None, "--context": context is not None}
        not_for_it = [name for name, there in given_too.items() if there]
        request = requested(size, steps or 50, guidance, seed, shots)
        sampled_pretrained(run, model, prompts, method, request, out, not_for_it, plugin, as_json)
        return
    refuse("zoo sample", misspelt_choices(bool(plugin), order=order))
    find("zoo sample", run, overrides or [], plugin)
    load_plugins(plugin, data=True)
    from experiments.analysis.formatting import number
    from experiments.execution.progress import counting
    from experiments.inspection.sample import Drawing, plot

    asked = {
        key: value for key, value in {"order": order, "context": context, "steps": steps}.items() if value is not None
    }
    drawing = Drawing(run, overrides or [], films=films, given=given, sampling=asked, plugins=plugin)
    with counting(errors, "steps", drawing.steps) as advance:
        sampled = drawing.draw(out, lambda: advance(""))
    plotted = None if picture is None else str(plot(sampled, picture).absolute())
    if as_json:
        print(json.dumps(asdict(sampled) | ({} if plotted is None else {"plot": plotted})))
        return
    for note in sampled.notes:
        errors.print(escape(note), soft_wrap=True)
    console.print(_drawn(sampled))
    for name, value in sampled.metrics.items():
        console.print(f"{escape(name)} {number(value)}")
    console.print(f"The strips and videos are in {escape(sampled.folder)}", soft_wrap=True)
    if plotted is not None:
        console.print(f"Plot: {escape(plotted)}", soft_wrap=True)


Times = Annotated[
    list[float], typer.Option("--times", help="Noise time, above 0 (clean) up to 1; may be repeated. .1 .3 .5 .7 .9.")
]


@app.command(epilog="Example: [bold]zoo ladder runs/train/moc-0123456789ab --method moc:top_k=8[/bold]")
def ladder(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a .ckpt in one; or calls.safetensors of a capture.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(
            help="Ask what METHOD[:key=value,...] would keep of the same q, k, v; may be repeated. Of a capture, the "
            "method that served it, if none."
        ),
    ] = [],  # noqa: B006
    films: Annotated[int | None, typer.Option(min=1, help="How many validation films to run; 2 if not given.")] = None,
    times: Times = [],  # noqa: B006
    heads: Annotated[bool, typer.Option("--heads", help="Show each head of each layer.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--plot", help="The plot, PNG or SVG; ladder.png in the run if not given."),
    ] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Tell a wrong router from a small budget: what a trained model's attention keeps beside other choices of its size.

    Validation films are noised and run through the model. In each layer and head, the share of dense attention's
    softmax that the method kept, and the error of its output, stand beside those of the best possible choice of as many
    pieces, of the choice by pooled keys, and of a random one. Of a pretrained model give a file of zoo capture.
    """
    reasons = misspelt_methods(map(parse_method, method), plugins=bool(plugin))
    refuse("zoo ladder", reasons + unfit_picture("--plot", out))
    of_calls = run.suffix == ".safetensors"
    if of_calls:
        given = {"overrides": overrides, "--films": films, "--times": times}
        refuse("zoo ladder", [f"{run} has films and noise times of its own; leave {x} out" for x in given if given[x]])
    else:
        find("zoo ladder", run, overrides or [], plugin)
    load_plugins(plugin, data=True)
    from experiments.execution.progress import counting
    from experiments.inspection.ladder import RULE, TIMES, climb, climb_captured, plot
    from experiments.inspection.trained import Trained

    if of_calls:
        with counting(errors, "calls", None) as advance:
            found = climb_captured(run, method, advance)
        folder = run.parent
    else:
        trained = Trained("zoo ladder", run, overrides or [], films or 2, plugin)
        for note in trained.notes:
            errors.print(escape(note), soft_wrap=True)
        at = tuple(times) or TIMES
        number = len(trained.batches) * len(at) * len(trained.module.model.blocks)
        with counting(errors, "attentions", number) as advance:
            found = climb(trained, at, method, advance)
        folder = trained.folder
    picture = plot(found, out or folder / "ladder.png").absolute()
    if as_json:
        print(json.dumps({**found.to_json(), "plot": str(picture)}))
        return
    for table in found.tables(heads=heads):
        console.print(table, "")
    for line in found.told():
        console.print(escape(line), soft_wrap=True)
    console.print(f"[dim]{RULE}[/dim]")
    console.print(f"Plot: {escape(str(picture))}", soft_wrap=True)


@app.command(epilog="Example: [bold]zoo capture runs/train/moc-0123456789ab --layers 0,2 --times 0.5[/bold]")
def capture(
    run: Annotated[Path | None, typer.Argument(help="A run's folder, or a .ckpt in one; or give --model.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("calls.safetensors"),
    layers: Annotated[str | None, typer.Option(help="Only these, from 0: 0,2.")] = None,
    films: Annotated[int, typer.Option(min=1, help="How many validation films to run.")] = 1,
    times: Times = [],  # noqa: B006
    model: Annotated[Path | None, typer.Option(help="Instead of RUN: folder of a diffusers pipeline.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="With --model: a text file, one prompt a line.")] = None,
    size: Annotated[str, typer.Option(help="With --model: frames x height x width.")] = "81x480x832",
    steps: Annotated[int, typer.Option(min=1, help="With --model: noise steps.")] = 50,
    shots: Annotated[str | None, typer.Option(help="With --model: latent frames of each shot: 6,6,9.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Save what attention is given in a trained model (q, k, v, hidden, layout), for zoo replay and for your own code.

    Each call of each chosen layer and noise time is kept bit for bit; `load` in `inspection.capture` reads them.
    """
    refuse("zoo capture", unwritable("--out", out))
    if model is not None or prompts is not None or run is None:
        captured_pretrained(run, overrides, model, prompts, size, steps, shots, layers, times, out, as_json)
        return
    find("zoo capture", run, overrides or [], plugin)
    load_plugins(plugin, data=True)
    from experiments.execution.progress import counting
    from experiments.inspection.capture import save
    from experiments.inspection.ladder import TIMES, layer_numbers
    from experiments.inspection.ladder import capture as captured_of
    from experiments.inspection.trained import Trained

    chosen = None if layers is None else layer_numbers(layers)
    trained = Trained("zoo capture", run, overrides or [], films, plugin)
    for note in trained.notes:
        errors.print(escape(note), soft_wrap=True)
    at = tuple(times) or TIMES
    with counting(errors, "attentions", len(trained.batches) * len(at) * len(trained.module.model.blocks)) as advance:
        captured = captured_of(trained, at, chosen, advance)
    path = save(out, captured).absolute()
    found = {"file": str(path), "bytes": path.stat().st_size, "calls": len(captured), "step": trained.step}
    if as_json:
        print(json.dumps(found))
        return
    console.print(f"{len(captured)} calls, {path.stat().st_size / 2**20:.1f} MiB: {escape(str(path))}", soft_wrap=True)


@app.command(epilog="Example: [bold]zoo replay calls.safetensors dense moc:top_k=2 moc:top_k=4 --plot front.png[/bold]")
def replay(
    file: Annotated[Path, typer.Argument(help="What zoo capture wrote.")],
    methods: Annotated[
        list[str] | None, typer.Argument(help="METHOD[:key=value,...]; every registered one, if none is given.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(help="Solve each method's knob so that the calls cost this: density=0.16, or flops of a call."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--plot", help="Also plot error against pairs, PNG or SVG.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Rank methods on captured calls, offline: pairs, softmax kept and at best, error of the output, seconds.

    Errors are against dense attention on the same q, k, v. What a method learns (moga's router) is not learnt here, and
    the row says so. Settings that are not given are the defaults; dense attention is always there, as the reference.
    With --match all cost the same; a method that cannot says why. The exit code is 1 if one that was named has failed.
    """
    reasons = misspelt_methods(map(parse_method, methods or []), plugins=bool(plugin))
    reasons += misspelt_match(match) + unfit_picture("--plot", out)
    refuse("zoo replay", reasons + ([] if file.is_file() else [f"no such file: {file}"]))
    load_plugins(plugin)
    from experiments.config.budget import Budget
    from experiments.execution.progress import counting
    from experiments.inspection import replay as offline
    from experiments.inspection.capture import load

    budget = None if match is None else Budget.of(dict([parse(match)]))
    captured = load(file)
    asked = offline.parse_methods(methods or [])
    with counting(errors, "methods", len(asked)) as moved:

        def advance(note: str, row: offline.Replayed | None) -> None:
            moved(note, 0 if row is None else 1)
            if row is not None:
                errors.print(f"[dim]{escape(offline.line(row))}[/dim]", soft_wrap=True)

        rows = offline.replay(captured, asked, budget, advance)
    failed = [row for row in rows if row.failed is not None]
    if out is not None and len(failed) < len(rows):
        offline.plot(rows, out)
    if as_json:
        print(json.dumps(offline.to_json(captured, rows, budget)))
    else:
        console.print(offline.table(captured, rows))
        console.print(f"[dim]{offline.LEGEND}[/dim]")
        for row in failed:
            console.print(f"[red]{escape(row.label)}[/red]: {escape(row.failed or '')}", soft_wrap=True)
        if out is not None and len(failed) < len(rows):
            console.print(f"Plot: {escape(str(out.absolute()))}", soft_wrap=True)
    if failed and (methods or len(failed) == len(rows)):
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo ui --port 5001[/bold]")
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000) -> None:
    """Open MLflow's own page on the runs; Ctrl-C ends it."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was in use a moment ago is free
        try:
            free.bind(("127.0.0.1", port))
        except OSError as error:
            refuse("zoo ui", [f"port {port} cannot be opened: {error.strerror}; give another one with --port"])
    from experiments.tracking.mlflow_logger import Tracker, serve

    pages = Tracker("Default", lambda line: errors.print(escape(line), soft_wrap=True)).cells_pages()
    address = f"http://127.0.0.1:{port}/#"
    # It opens on its pages for language models otherwise.
    page = f"{address}/experiments?workflowType=machine_learning"
    console.print(f"MLflow starts on {page} (it takes about 15 seconds; Ctrl-C ends it)", soft_wrap=True)
    for name, path in list(pages.items())[:SHOWN_SWEEPS]:
        console.print(f"Cells of the sweep {escape(name)}: {address}/{path}", soft_wrap=True)
    if len(pages) > SHOWN_SWEEPS:
        console.print(f"and of {len(pages) - SHOWN_SWEEPS} older sweeps: the view Cells of their pages")
    raise typer.Exit(serve(port))


def _drawn(sampled: Sampled) -> Table:
    settings = " · ".join(f"{key} {value}" for key, value in sampled.sampling.items() if value is not None)
    table = Table(title=escape(f"{Path(sampled.checkpoint).name} · {settings}"), title_justify="left")
    chosen = sampled.sampling["context"] is not None
    for title in ("film", "shots", "given", *(["each shot beside"] if chosen else []), "strip", "video"):
        table.add_column(title, overflow="fold")
    for film in sampled.films:
        beside = [f"{shot}: {' '.join(map(str, taken)) or '–'}" for shot, taken in (film["taken"] or {}).items()]
        row = [film["name"], str(film["shots"]), str(film["given"]), *(["; ".join(beside)] if chosen else [])]
        table.add_row(*map(escape, row), *(escape(Path(film[kind]).name) for kind in ("strip", "video")))
    return table
