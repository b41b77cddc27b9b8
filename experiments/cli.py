"""The `zoo` command. Heavy imports wait until a command needs them, so that `zoo list` answers at once."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    from experiments.forecast import Forecast
    from experiments.report import Report
    from experiments.sampling import Sampled
    from experiments.store import Result
    from sparse_zoo import Setting

# Read when torch is first imported. OpenMP's threads spin while they wait; where other programs want the same cores, a
# step took 10 times as long for it. Spinning for a short time only costs nothing where they do not.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Read when torch is first imported: its profiler, which counts memory for zoo bench, would tell of its every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

EXECUTORS = ("local", "slurm", "ray")

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
            errors.print(f"[bold red]Error:[/bold red] {_escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except OSError as error:
            from experiments.store import home

            if error.errno not in NO_PLACE:
                raise
            told = f"{error}; runs lie in {home()}, or where $ZOO_HOME says"
            errors.print(f"[bold red]Error:[/bold red] {_escape(told)}", soft_wrap=True)
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


@app.command(epilog="Example: [bold]zoo train attention=moc attention.top_k=2 trainer.max_steps=50[/bold]")
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value, over configs/base.yaml: attention=NAME takes a method, data=shot_world other films."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file laid over the base config, below the overrides.")
    ] = None,
    plugin: Plugin = [],  # noqa: B006
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an interrupted run anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model and say what came out; one that was interrupted goes on from its last checkpoint."""
    _load_plugins(plugin)
    from experiments.config import load, read_yaml
    from experiments.match import solved
    from experiments.progress import Bar
    from experiments.report import settings
    from experiments.run import run
    from experiments.store import Cell, lock
    from experiments.tracking import Tracker
    from sparse_zoo.errors import refuse

    resolved = solved(load([*([read_yaml(config)] if config else []), *(overrides or [])]))
    methods = resolved["attention"] if isinstance(resolved["attention"], list) else [resolved["attention"]]
    cell = Cell("-".join(dict.fromkeys(str(method["name"]) for method in methods)), resolved)
    try:
        with Bar(errors, 1) as bar, lock(cell.folder("train")) as mine:
            refuse(cell.name, [] if mine else [f"the same run is going on elsewhere, in {cell.folder('train')}"])
            result = run(cell, "train", Tracker("train", bar.note), bar, fresh=fresh)
    except KeyboardInterrupt:
        errors.print(f"Stopped. What there is lies in {cell.folder('train')}", soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        console.print(_one_run(result, settings(resolved["attention"])))
        console.print(f"The run lies in {result.folder}", soft_wrap=True)
    if result.status == "failed":
        errors.print(f"[bold red]Failed:[/bold red] {_escape(result.reason or '')}", soft_wrap=True)
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo sweep quickstart[/bold], and the same again to run only what is missing")
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file, or the name of one in experiments/sweeps.")],
    max_steps: Annotated[int | None, typer.Option(min=1, help="Train every cell for this many steps at most.")] = None,
    size: Annotated[
        str | None, typer.Option(help="One of the file's `sizes`; its results are those of the sweep NAME-SIZE.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run finished cells again too, and half-done ones from their start.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: list the cells, what they would take, how far they are.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="So many cells at a time, each in a process, with a GPU, of its own; on SLURM in a job, on Ray a task."
        ),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="Where cells run: local; slurm, as one array job; ray, as tasks of Ray.")
    ] = "local",
    slurm: Annotated[
        list[str],
        typer.Option("--slurm", help="key=value, a parameter of sbatch, such as partition=gpu; may be repeated."),
    ] = [],  # noqa: B006
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Stay until SLURM has run the cells.")] = True,
    plugin: Plugin = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON and nothing else.")] = False,
) -> None:
    """Run every cell of a sweep that has not finished, then write its report.

    Before the first one runs every cell is checked, budgets are solved, models are built and planned on the films
    themselves. A cell that fails is recorded with its reason and the others go on; the exit code is then 1.
    """
    _load_plugins(plugin)
    from experiments import trial
    from experiments.launch import execute
    from experiments.progress import Bar
    from experiments.ray_jobs import needed
    from experiments.report import Report
    from experiments.slurm import parameters
    from experiments.sweep import find, read
    from sparse_zoo.errors import refuse, unknown

    refuse(
        "zoo sweep",
        [
            unknown("executor", executor, EXECUTORS) if executor not in EXECUTORS else "",
            "--slurm and --no-wait are for --executor slurm" if executor != "slurm" and (slurm or not wait) else "",
            "--json goes with --dry-run" if as_json and not dry_run else "",
        ],
    )
    settings = parameters(slurm) if executor == "slurm" else None
    if executor == "ray":
        needed()
    with errors.status("cells are read") as status:
        shorter = [] if max_steps is None else [{"trainer.max_steps": max_steps}]
        loaded = read(find(file), shorter, size, lambda name: status.update(f"the budget of {_escape(name)} is solved"))
        status.update("cells are tried")
        trial.check(loaded.cells)
        if dry_run:
            from experiments.forecast import Forecast

            forecast = Forecast.of(loaded, lambda name: status.update(f"{_escape(name)} is timed"))
    if dry_run:
        _foretold(forecast, as_json)
        return
    interrupted = False
    try:
        with Bar(errors, len(loaded.cells)) as bar:
            execute(loaded, bar, fresh=fresh, jobs=jobs, slurm=settings, ray=executor == "ray", wait=wait)
    except KeyboardInterrupt:
        interrupted = True
    report = Report.of(loaded.name)
    page = report.write()
    _show(report, page)
    if interrupted:
        console.print(f"Stopped. Finished cells are kept; go on with: {_escape(_again())}", soft_wrap=True)
        raise typer.Exit(130)
    if report.unfinished and wait:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo report quickstart[/bold]")
def report(
    name: Annotated[str, typer.Argument(help="A sweep that has run.")],
    by: Annotated[
        str | None, typer.Option(help="The measure that ranks and is tested; identity_recall, or else val_loss.")
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="Show single runs, not their means over seeds.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, for an appendix.")
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the tables as LaTeX, with booktabs.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the Markdown or LaTeX.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Write the figures alone into this file, JSON to keep when the runs are gone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a sweep (report.html, report.json) and show its leaderboard and which differences hold."""
    from experiments.report import Report
    from sparse_zoo.errors import refuse

    refuse(
        "report",
        ["give one of --markdown, --latex, --json and --results"]
        * (markdown + latex + as_json + (results is not None) > 1)
        + ["--out needs --markdown or --latex"] * (out is not None and not markdown and not latex),
    )
    found = Report.of(name, by)
    if results is not None:
        from experiments.record import write_record

        write_record(found, results)
        return
    if markdown or latex:
        from experiments import appendix

        text = appendix.markdown(found) if markdown else appendix.latex(found)
        if out is None:
            print(text)
        else:
            out.write_text(text)
        return
    page = found.write()
    if as_json:
        print(json.dumps(found.to_json()))
        return
    _show(found, page, runs=runs)


@app.command(
    epilog="Example: [bold]zoo sample runs/train/moc-0123456789ab data.returns=9 --order shots --context 3[/bold]"
)
def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a .ckpt in one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    films: Annotated[int, typer.Option(min=1, help="How many validation films to draw.")] = 4,
    given: Annotated[int, typer.Option(min=0, help="How many first shots of each film are given, not drawn.")] = 0,
    order: Annotated[str | None, typer.Option(help="film: all shots at once; shots: one after the other.")] = None,
    context: Annotated[
        int | None, typer.Option(min=0, help="Draw by shots, beside so many earlier ones, chosen by their means.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Euler steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the strips; a new one in the run if not given.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Draw films with a trained model, of more shots than it was trained on if the data has them, and judge them.

    What is not asked for is as in the run's config.
    """
    _load_plugins(plugin)
    from experiments.progress import counting
    from experiments.report import number
    from experiments.sampling import Drawing

    asked = {
        key: value for key, value in {"order": order, "context": context, "steps": steps}.items() if value is not None
    }
    drawing = Drawing(run, overrides or [], films=films, given=given, sampling=asked)
    with counting(errors, "steps", drawing.steps) as told:
        sampled = drawing.draw(out, lambda: told(""))
    if as_json:
        print(json.dumps(asdict(sampled)))
        return
    for note in sampled.notes:
        errors.print(_escape(note), soft_wrap=True)
    console.print(_drawn(sampled))
    for name, value in sampled.metrics.items():
        console.print(f"{name} {number(value)}")
    console.print(f"The strips lie in {sampled.folder}", soft_wrap=True)


Times = Annotated[
    list[float], typer.Option("--times", help="Noise time, above 0 (clean) up to 1; may be repeated. .1 .3 .5 .7 .9.")
]


@app.command(epilog="Example: [bold]zoo ladder runs/train/moc-0123456789ab --method moc:top_k=8[/bold]")
def ladder(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a .ckpt in one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(help="Ask what METHOD[:key=value,...] would keep of the same q, k, v; may be repeated."),
    ] = [],  # noqa: B006
    films: Annotated[int, typer.Option(min=1, help="How many validation films to run.")] = 2,
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
    pieces, of the choice by pooled keys, and of a random one.
    """
    _load_plugins(plugin)
    from experiments.ladder import RULE, TIMES, climb, plot
    from experiments.progress import counting
    from experiments.trained import Trained

    trained = Trained("zoo ladder", run, overrides or [], films)
    at = tuple(times) or TIMES
    with counting(errors, "attentions", len(trained.batches) * len(at) * len(trained.module.model.blocks)) as told:
        found = climb(trained, at, method, told)
    picture = plot(found, out or trained.folder / "ladder.png").absolute()
    if as_json:
        print(json.dumps({**found.to_json(), "plot": str(picture)}))
        return
    for table in found.tables(heads=heads):
        console.print(table, "")
    for line in found.told():
        console.print(_escape(line), soft_wrap=True)
    console.print(f"[dim]{RULE}[/dim]")
    console.print(f"Plot: {picture}", soft_wrap=True)


@app.command(epilog="Example: [bold]zoo capture runs/train/moc-0123456789ab --layers 0,2 --times 0.5[/bold]")
def capture(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a .ckpt in one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value over the run's config: other films, longer ones.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path("calls.safetensors"),
    layers: Annotated[str | None, typer.Option(help="Only these, from 0: 0,2.")] = None,
    films: Annotated[int, typer.Option(min=1, help="How many validation films to run.")] = 1,
    times: Times = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Save what attention is given in a trained model (q, k, v, hidden, layout), for zoo replay and for your own code.

    Each call of each chosen layer and noise time is kept bit for bit; experiments.captures.load gives them back.
    """
    _load_plugins(plugin)
    from experiments.captures import save
    from experiments.ladder import TIMES, layer_numbers
    from experiments.ladder import capture as captured_of
    from experiments.progress import counting
    from experiments.trained import Trained

    chosen = None if layers is None else layer_numbers(layers)
    trained = Trained("zoo capture", run, overrides or [], films)
    at = tuple(times) or TIMES
    with counting(errors, "attentions", len(trained.batches) * len(at) * len(trained.module.model.blocks)) as told:
        captured = captured_of(trained, at, chosen, told)
    path = save(out, captured).absolute()
    found = {"file": str(path), "bytes": path.stat().st_size, "calls": len(captured), "step": trained.step}
    if as_json:
        print(json.dumps(found))
        return
    console.print(f"{len(captured)} calls, {path.stat().st_size / 2**20:.1f} MiB: {path}", soft_wrap=True)


@app.command(epilog="Example: [bold]zoo replay calls.safetensors dense moc:top_k=2 moc:top_k=4 --plot front.png[/bold]")
def replay(
    file: Annotated[Path, typer.Argument(help="What zoo capture wrote.")],
    methods: Annotated[
        list[str] | None, typer.Argument(help="METHOD[:key=value,...]; every registered one, if none is given.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(help="Turn each method's knob until the calls cost this: density=0.16, or flops of a call."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--plot", help="Also draw error against pairs, PNG or SVG.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Rank methods on captured calls, offline: pairs, softmax kept and at best, error of the output, seconds.

    Errors are against dense attention on the same q, k, v. What a method learns (moga's router) is not learnt here, and
    the row says so. Without settings a method has its defaults, on films under 1024 tokens its settings for tiny films.
    With --match all cost the same; a method that cannot says why. The exit code is 1 if one that was named has failed.
    """
    _load_plugins(plugin)
    from experiments import replay as offline
    from experiments.captures import load
    from experiments.config import parse
    from experiments.match import Budget
    from experiments.progress import counting

    budget = None if match is None else Budget.of(dict([parse(match)]))
    captured = load(file)
    asked = offline.asked(methods or [], captured, budget)
    with counting(errors, "methods", len(asked)) as moved:

        def told(note: str, row: offline.Replayed | None) -> None:
            moved(note, 0 if row is None else 1)
            if row is not None:
                errors.print(f"[dim]{_escape(offline.line(row))}[/dim]", soft_wrap=True)

        rows = offline.replay(captured, asked, budget, told)
    failed = [row for row in rows if row.failed is not None]
    if out is not None and len(failed) < len(rows):
        offline.plot(rows, out)
    if as_json:
        print(json.dumps(offline.to_json(captured, rows, budget)))
    else:
        console.print(offline.table(captured, rows))
        console.print(f"[dim]{offline.LEGEND}[/dim]")
        for row in failed:
            console.print(f"[red]{_escape(row.label)}[/red]: {_escape(row.failed or '')}", soft_wrap=True)
        if out is not None and len(failed) < len(rows):
            console.print(f"Plot: {out.absolute()}", soft_wrap=True)
    if failed and (methods or len(failed) == len(rows)):
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo ui --port 5001[/bold]")
def ui(port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000) -> None:
    """Open MLflow's own page on the runs; Ctrl-C ends it."""
    from experiments.tracking import serve

    # It opens on its pages for language models otherwise.
    page = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    console.print(f"MLflow starts on {page} (it takes about 15 seconds; Ctrl-C ends it)", soft_wrap=True)
    raise typer.Exit(serve(port))


@app.command("list", epilog="Example: [bold]zoo list moc[/bold], or [bold]zoo list --plugin my_method.py[/bold]")
def list_(
    methods: Annotated[list[str] | None, typer.Argument(help="Show the settings of these.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show methods, a line each, and kernels with the reasons where one cannot run here; of methods named the settings.

    --json has the settings of all.
    """
    _load_plugins(plugin)
    import sparse_zoo as zoo

    names = zoo.names()  # first: what is installed may bring kernels along
    for name in methods or []:
        zoo.get(name)
    names = methods or names
    kernels = zoo.kernels()
    if as_json:
        described = [
            {
                "name": name,
                "summary": zoo.summary(name),
                "settings": {
                    key: {"default": _plain(setting.default), "type": setting.type, "doc": setting.doc}
                    for key, setting in zoo.settings(name).items()
                },
            }
            for name in names
        ]
        listed = [{"name": name, "usable": not reasons, "reasons": reasons} for name, reasons in kernels.items()]
        print(json.dumps({"methods": described, "kernels": listed}))
        return
    if methods:
        shared = zoo.settings("dense")
        for name in methods:
            console.print(f"\n[bold]{name}[/bold]  {_escape(zoo.summary(name))}")
            console.print(_settings({key: own for key, own in zoo.settings(name).items() if key not in shared}))
        console.print("[bold]every method[/bold]")
        console.print(_settings(shared))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=2 + max(map(len, names)))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name in names:
        table.add_row(f"  [cyan]{name}[/cyan]", _escape(zoo.summary(name)))
    console.print("[bold]methods[/bold] (zoo list NAME shows its settings)")
    console.print(table)
    table = Table.grid(padding=(0, 2))
    for name, reasons in kernels.items():
        table.add_row(
            f"  [cyan]{name}[/cyan]", "[green]runs here[/green]" if not reasons else _escape("; ".join(reasons))
        )
    console.print("\n[bold]kernels[/bold]")
    console.print(table)


@app.command(epilog="Example: [bold]zoo check own_and_previous_shots --plugin own_shots.py[/bold]")
def check(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods to check; all that are known, if none.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Run the conformance suite on methods; exit code 1 if any check fails.

    A check judges what a method says and what it computes: plans against their meaning, output and gradients against an
    oracle in float64, packed films against each one alone, and what the class declares of itself.
    """
    _load_plugins(plugin)
    import sparse_zoo as zoo
    from experiments.progress import counting
    from sparse_zoo.testing import Outcome, checks, run_checks

    names = list(dict.fromkeys(methods or zoo.names()))
    for name in names:
        zoo.get(name)  # an unknown one is refused before the others take their time
    outcomes: list[Outcome] = []
    with counting(errors, "checks", len(names) * len(checks())) as told:
        for name in names:
            for outcome in run_checks(name):
                outcomes.append(outcome)
                told(f"{name}: {outcome.check}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if as_json:
        print(json.dumps({"checks": [asdict(outcome) for outcome in outcomes]}))
    else:
        table = Table(title="Conformance", title_justify="left")
        for title in ("method", "passed", "failed", "skipped", "seconds"):
            table.add_column(title, justify="left" if title == "method" else "right")
        for name in names:
            own = [outcome for outcome in outcomes if outcome.method == name]
            counts = [str(sum(x.status == status for x in own)) for status in ("passed", "failed", "skipped")]
            table.add_row(name, *counts, f"{sum(x.seconds for x in own):.1f}")
        console.print(table)
        for outcome in outcomes:
            if outcome.status != "passed":
                colour = "red" if outcome.status == "failed" else "dim"
                text = f"{outcome.method}: {outcome.check} {outcome.status}: {outcome.reason}"
                console.print(f"[{colour}]{_escape(text)}[/{colour}]", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command("map", epilog="Example: [bold]zoo map moc top_k=2 chunk=frame --out moc.png[/bold]")
def map_(
    method: Annotated[str, typer.Argument(help="A method, see zoo list.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings, key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the PNG; map-METHOD.png if not given.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Draw who attends to whom in a small film of twelve shots, and which shot routes to which.

    Queries and keys are simulated, the same for every method: shots share subjects and scenes, and the late shots 9 and
    11 show what no other does. Without causal routing they choose each other and lose the shots before: a loop. Compare
    `zoo map moc causal=null` with `zoo map moc`. Where a method sorts tokens into groups, as moga does, these are
    painted over the frames.
    """
    _load_plugins(plugin)
    from experiments.config import parse
    from experiments.pictures import loop_text, sample_map
    from experiments.report import percent

    drawn = sample_map(method, dict(parse(text) for text in settings or []))
    path = drawn.save(out or Path(f"map-{method}.png"))
    if as_json:
        print(json.dumps({**drawn.to_json(), "picture": str(path.absolute())}))
        return
    found = drawn.to_json()
    table = Table(title=f"{method} on a film of {found['tokens']} tokens", title_justify="left")
    for title in ("branch", "density", "softmax kept", "at best", "loops"):
        table.add_column(title, justify="left" if title == "loops" else "right")
    for row in found["branches"]:
        shares = (percent(row.get(key)) for key in ("density", "mass", "mass_best"))
        told = "nothing routed" if row["loops"] is None else ", ".join(map(loop_text, row["loops"])) or "none"
        table.add_row(str(row["branch"]), *shares, told)
    table.add_row("all", percent(drawn.density), "", "", str(len(found["loops"])))
    console.print(table)
    console.print(f"Map: {path.absolute()}", soft_wrap=True)


@app.command(
    epilog="Example: [bold]zoo cost moc top_k=5 --shots 8 --frames 25 --rows 30 --cols 30[/bold]; "
    "[bold]zoo cost --paper moga[/bold]"
)
def cost(
    ctx: typer.Context,
    method: Annotated[str | None, typer.Argument(help="A method, see zoo list.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings, key=value.")] = None,
    match: Annotated[
        str | None, typer.Option(help="Turn the method's knob until it costs this: density=0.16, or flops of a step.")
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(help="Instead: recompute every sparsity and FLOPs figure that a paper prints, moc or moga."),
    ] = None,
    shots: Annotated[int, typer.Option(help="Shots of the film.")] = 8,
    frames: Annotated[int, typer.Option(help="Frames of a shot, in tokens: latent frames.")] = 6,
    rows: Annotated[int, typer.Option(help="Rows of a frame, in tokens.")] = 16,
    cols: Annotated[int, typer.Option(help="Columns of a frame, in tokens.")] = 16,
    text: Annotated[int, typer.Option(help="Tokens of each shot's caption.")] = 64,
    caption: Annotated[int, typer.Option(help="Tokens of the film's global caption.")] = 64,
    dim: Annotated[int, typer.Option(help="Width of the model.")] = 1536,
    depth: Annotated[int, typer.Option(help="Its layers.")] = 30,
    heads: Annotated[int, typer.Option(help="Its attention heads.")] = 12,
    mlp_ratio: Annotated[float, typer.Option(help="Width of its MLPs, in dims.")] = 4.0,
    text_mode: Annotated[str, typer.Option(help="Captions in the stream (joint) or by cross-attention (cross).")] = (
        "joint"
    ),
    batch: Annotated[int, typer.Option(help="Films at once.")] = 1,
    kernel: Annotated[str, typer.Option(help="Whose tiles to count; it need not run here.")] = "torch",
    every_head: Annotated[
        bool, typer.Option("--every-head", help="Simulate every head, for methods whose heads differ; two, if not.")
    ] = False,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Count what a method costs beside dense attention, without running it: pairs, FLOPs, bytes, padding.

    The method's own plan is built at the size asked for, on random queries and keys; no weights, no GPU and no L × L
    table are needed. FLOPs are of the whole VideoDiT. With --paper, the published figures are recomputed the same way
    and each is marked: it agrees, agrees under a reading that is named, or does not follow.
    """
    from sparse_zoo.errors import refuse

    if paper is not None:
        from experiments.papers import PAPERS, Ledger
        from experiments.progress import counting
        from sparse_zoo.errors import unknown

        given = [
            parameter.opts[0]
            for parameter in ctx.command.params
            if (source := ctx.get_parameter_source(parameter.name or "")) is not None
            and source.name == "COMMANDLINE"
            and parameter.name not in ("paper", "as_json")
        ]
        refuse(
            "zoo cost --paper",
            [
                unknown("paper", paper, PAPERS) if paper not in PAPERS else "",
                f"has the paper's methods and sizes; leave out {', '.join(given)}" if given else "",
            ],
        )
        with counting(errors, "figures", len(PAPERS[paper].figures)) as told:
            ledger = Ledger.of(paper, told)
        if as_json:
            print(json.dumps(ledger.to_json()))
        else:
            ledger.show(console)
        return
    refuse("zoo cost", ["name a method, see zoo list, or a paper with --paper"] if method is None else [])
    assert method is not None
    _load_plugins(plugin)
    from experiments.config import parse
    from experiments.costs import NOTES, Films, compare
    from lit_modules.flops import ModelShape

    own = dict(parse(text) for text in settings or [])
    films, shape = Films(shots, frames, rows, cols, text, caption), ModelShape(dim, depth, heads, mlp_ratio, text_mode)
    if match is not None:
        from experiments.match import solved_alone

        asked = dict([parse(match)])
        own |= solved_alone(method, own, asked, films.layout(), shape, batch=batch, every_head=every_head)
    found = compare(method, own, films, shape, batch=batch, kernel=kernel, every_head=every_head)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    console.print(found.table())
    if match is not None:
        console.print(f"At {', '.join(f'{key} {_plain(value)}' for key, value in own.items())}")
    for note in NOTES:
        console.print(f"[dim]{_escape(note)}[/dim]")


@app.command(epilog="Example: [bold]zoo bench --suite shots --plot time.png[/bold]")
def bench(
    suite: Annotated[str, typer.Option(help="What to measure: quick, cpu, shots or gpu.")] = "quick",
    method: Annotated[list[str], typer.Option(help="Only this method; may be repeated.")] = [],  # noqa: B006
    tokens: Annotated[
        list[int],
        typer.Option(help="The cpu suite's methods on films of this length instead; may be repeated."),
    ] = [],  # noqa: B006
    kernel: Annotated[str | None, typer.Option(help="This kernel for every method.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, for every method.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns; medians are given.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw time against length, as PNG.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure how much of the speedup that its pair count allows a method attains.

    attained: seconds of the fastest dense attention here ÷ seconds of the method, routing included, turn by turn in one
    process; bound: 1 / density. A kernel that errs against the oracle gets no time. quick: every method, seconds; cpu:
    2k to 64k tokens, 15 minutes; shots: 1 to 32 shots; gpu: 180k tokens in half precision. Measure on a quiet machine.
    """
    _load_plugins(plugin)
    import torch

    from experiments.progress import counting
    from sparse_zoo import bench as speed

    device = torch.device("cuda" if torch.cuda.is_available() and suite == "gpu" else "cpu")
    rounds = speed.chosen(suite, method, tokens, kernel, dtype)
    with counting(errors, "turns", speed.events(rounds, repeats, device)) as told:
        found = speed.run(rounds, repeats, device, told)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    timed = any("failed" not in row for row in found["rows"])
    if plot is not None and timed:
        from experiments.speed import plot as draw

        draw(found, plot)
    if as_json:
        print(json.dumps(found))
    else:
        console.print(_speeds(found))
        for written in filter(None, (out, plot if timed else None)):
            console.print(f"Written: {written.absolute()}", soft_wrap=True)
    if any("failed" in row for row in found["rows"]):
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    app()


def _load_plugins(paths: Sequence[Path]) -> None:
    if paths:
        import sparse_zoo as zoo

        for path in paths:
            zoo.load_plugin(path)


def _show(report: Report, page: Path, *, runs: bool = False) -> None:
    """The leaderboard, what holds, what did not finish, where the page is."""
    from experiments.report import p_value, signed

    console.print(*report.tables(runs=runs), sep="\n")
    for pair in report.tested:
        if pair.holds:
            console.print(f"[bold]{pair.a} – {pair.b}[/bold] {signed(pair.mean)}, p {p_value(pair.p_holm)} (Holm)")
    console.print(f"{report.verdict} {report.caution}".strip(), highlight=False)
    for names, result in report.unfinished_alike.items():
        console.print(f"[red]{names}[/red], {result.status}: {_escape(result.reason or '')}", soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)


def _settings(settings: Mapping[str, Setting]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, setting in settings.items():
        default = "needed" if setting.required else f"= {_plain(setting.default)}"
        table.add_row(f"  [cyan]{key}[/cyan]", _escape(default), f"[dim]{_escape(setting.doc)}[/dim]")
    return table


def _one_run(result: Result, title: str) -> Table:
    from experiments.report import giga, number, percent

    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in (
        ("status", result.status),
        ("steps", str(result.steps)),
        ("first loss", number(result.first_loss)),
        ("last loss", number(result.last_loss)),
        ("val loss", number(result.val_loss)),
        *((key, number(value)) for key, value in result.metrics.items()),
        ("density", percent(result.density)),
        ("attention GFLOPs", giga(result.flops)),
        ("kernel", result.kernel or "–"),
        ("s/step", number(result.seconds_per_step)),
        *(("skipped", f"{bad['path']}: {bad['reason']}") for bad in result.data.get("skipped", [])),
    ):
        table.add_row(key, _escape(value))
    return table


def _foretold(forecast: Forecast, as_json: bool) -> None:
    from experiments.forecast import NOTES

    if as_json:
        print(json.dumps(forecast.to_json()))
        return
    console.print(*forecast.tables(), sep="\n")
    for note in NOTES:
        console.print(f"[dim]{_escape(note)}[/dim]")


def _drawn(sampled: Sampled) -> Table:
    settings = " · ".join(f"{key} {value}" for key, value in sampled.sampling.items() if value is not None)
    table = Table(title=f"{Path(sampled.checkpoint).name} · {settings}", title_justify="left")
    chosen = sampled.sampling["context"] is not None
    for title in ("film", "shots", "given", *(["each shot beside"] if chosen else []), "strip"):
        table.add_column(title, overflow="fold")
    for film in sampled.films:
        beside = [f"{shot}: {' '.join(map(str, taken)) or '–'}" for shot, taken in (film["taken"] or {}).items()]
        row = [film["name"], str(film["shots"]), str(film["given"]), *(["; ".join(beside)] if chosen else [])]
        table.add_row(*map(_escape, row), _escape(Path(film["strip"]).name))
    return table


def _speeds(found: Mapping[str, Any]) -> Table:
    about = f"{found['device']}, torch {found['versions']['torch']}; fwd: forward, all: forward + backward"
    table = Table(title=about, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.caption = "±: (slowest - fastest turn) ÷ median"
    for title in ("method", "kernel", "tokens", "pass", "ms", "dense", "attained", "÷ bound", "memory", "±"):
        table.add_column(title, justify="left" if title in ("method", "kernel", "pass") else "right", no_wrap=True)
    for row in found["rows"]:
        name = (row["method"], row["kernel"], f"{row['tokens']:,}")
        if "failed" in row:
            console.print(f"[red]{row['method']} on {row['kernel']}[/red]: {_escape(row['failed'])}", soft_wrap=True)
            continue
        which = "fwd" if row["pass"] == "forward" else "all"
        times = (f"{row['seconds'] * 1e3:.1f}", f"{row['dense_seconds'] * 1e3:.1f}")
        speed = (f"{row['attained']:.2f} of {row['bound']:.2f}", f"[bold]{row['attained_over_bound']:.2f}[/bold]")
        table.add_row(*name, which, *times, *speed, f"{row['peak_memory_ratio']:.2f}", f"{row['spread']:.0%}")
    return table


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _again() -> str:
    """The command line as the user typed it."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
