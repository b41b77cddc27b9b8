"""Commands that train, and that report what was trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from experiments.analysis.metrics import COST_SENSES, measures_to_rank_by
from experiments.cli.shell import AsJson, Plugin, app, console, errors, load_plugins
from experiments.config.names import Override, misspelt, misspelt_choices
from experiments.config.yaml12 import read_yaml
from experiments.escape import for_terminal as escape
from experiments.sweep.schema import Written, find_sized
from experiments.tracking.store import read, read_sweep
from sparse_zoo.errors import refuse, unknown

SHOWN_SEEDS = (3, 5, 7, 10, 15, 20, 30)  # numbers of seeds that `zoo power` lists

if TYPE_CHECKING:
    from experiments.reporting.report import Report
    from experiments.sweep.dry_run import Forecast
    from experiments.sweep.expand import Sweep
    from experiments.tracking.store import Cell, Result


@app.command(epilog="Example: [bold]zoo train attention=moc attention.top_k=2 trainer.max_steps=50[/bold]")
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value, over configs/base.yaml: attention=NAME takes a method, data=shot_world other films; "
            "zoo settings lists all keys."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file laid over the base config, below the overrides.")
    ] = None,
    plugin: Plugin = [],  # noqa: B006
    fresh: Annotated[bool, typer.Option("--fresh", help="Restart an interrupted run from its first step.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model and say what came out; an interrupted run resumes from its last checkpoint."""
    given: list[Override] = [*([read_yaml(config)] if config else []), *(overrides or [])]
    refuse("config", misspelt(given, plugins=bool(plugin)))
    load_plugins(plugin)
    from experiments.analysis.formatting import settings
    from experiments.config.resolve import cannot_start, load
    from experiments.config.resolve import cell as make_cell
    from experiments.execution.progress import Bar
    from experiments.execution.run import run
    from experiments.sweep.budget import solved
    from experiments.sweep.preflight import unfit_limits
    from experiments.tracking.address import tracking_uri
    from experiments.tracking.mlflow_logger import Tracker
    from experiments.tracking.store import lock

    tracking_uri()  # refused before anything is solved or trained
    asked = load(given)
    refuse("zoo train", cannot_start(asked) or unfit_limits(asked))
    resolved = solved(asked)
    methods = resolved["attention"] if isinstance(resolved["attention"], list) else [resolved["attention"]]
    cell = make_cell("-".join(dict.fromkeys(str(method["name"]) for method in methods)), resolved)
    try:
        with Bar(errors, 1) as bar, lock(cell.folder("train")) as mine:
            refuse(cell.name, [] if mine else [f"another process is running it, in {cell.folder('train')}"])
            result = run(cell, "train", Tracker("train", bar.note), bar, fresh=fresh)
    except KeyboardInterrupt:
        errors.print(f"Stopped. The files of the run are kept in {escape(str(cell.folder('train')))}", soft_wrap=True)
        raise
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        console.print(_one_run(result, settings(resolved["attention"])))
        console.print(f"The run is in {escape(result.folder)}", soft_wrap=True)
    if result.status != "finished":
        errors.print(
            f"[bold red]{result.status.capitalize()}:[/bold red] {escape(result.reason or '')}", soft_wrap=True
        )
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo sweep quickstart[/bold], and the same again to run only what is missing")
def sweep(
    file: Annotated[
        str, typer.Argument(help="A sweep file, or the name of one in experiments/sweeps, with -SIZE or without.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value, for every cell, over the file: trainer.max_steps=50. A key that a cell sets itself is "
            "refused. The changed cells are other cells, with results of their own."
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Train every cell for this many steps at most.")] = None,
    size: Annotated[
        str | None, typer.Option(help="One of the file's `sizes`; its results are those of the sweep NAME-SIZE.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run every cell from its first step, finished and interrupted ones too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing: list the cells, what they would take, how far they are.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="So many cells at a time, each in a process with a GPU of its own; on SLURM in a job, on Ray a task.",
        ),
    ] = None,
    jobs_per_gpu: Annotated[
        int,
        typer.Option(min=1, help="So many of these processes on one GPU: a small model leaves most of it idle."),
    ] = 1,
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
    themselves. A cell that fails is recorded with its reason and the others still run; the exit code is then 1.
    Where the file has a `tune` section its trials run first, and each cell then runs with its best setting.
    """
    given = overrides or []
    refuse(
        "zoo sweep",
        [
            *misspelt_choices(bool(plugin), executor=executor),
            "--slurm and --no-wait are for --executor slurm" if executor != "slurm" and (slurm or not wait) else "",
            "--jobs-per-gpu is for --executor local" if executor != "local" and jobs_per_gpu > 1 else "",
            "--json goes with --dry-run" if as_json and not dry_run else "",
            "trainer.max_steps is given twice, by --max-steps too; leave out one"
            if max_steps is not None and any(text.startswith("trainer.max_steps=") for text in given)
            else "",
        ],
    )
    path, sized = find_sized(file, size)
    Written.of(path, sized).check_names(given, plugins=bool(plugin))
    load_plugins(plugin)
    from experiments.execution.progress import Bar
    from experiments.execution.ray_jobs import needed
    from experiments.execution.scheduler import execute
    from experiments.execution.slurm import parameters
    from experiments.reporting.html import write
    from experiments.reporting.report import build_report
    from experiments.sweep import preflight
    from experiments.sweep.expand import read
    from experiments.tracking.address import tracking_uri
    from experiments.tracking.store import home, last_request

    tracking_uri()  # refused before anything is solved or trained
    settings = parameters(slurm) if executor == "slurm" else None
    if executor == "ray":
        needed()
    with errors.status("cells are read") as status:
        shorter: list[Override] = [] if max_steps is None else [{"trainer.max_steps": max_steps}]
        shared = [*shorter, *given]

        def solving(name: str) -> None:
            status.update(f"the budget of {escape(name)} is solved")

        loaded = read(path, shared, sized, solving)
        cells = (*(loaded.trials.sweep.cells if loaded.trials else ()), *loaded.cells)
        status.update("preflight check of the cells")
        preflight.check(cells)
        if executor == "local" and not dry_run:
            refuse("zoo sweep", _cannot_start(cells))
        if executor != "local":
            refuse(f"zoo sweep --executor {executor}", _machine_dependent(cells))
        if dry_run:
            from experiments.sweep.dry_run import Forecast

            forecast = Forecast.of(loaded, lambda name: status.update(f"{escape(name)} is timed"))
    if dry_run:
        _print_forecast(forecast, as_json)
        return
    interrupted = None
    how: dict[str, Any] = {"fresh": fresh, "jobs": jobs, "jobs_per_gpu": jobs_per_gpu}
    how |= {"slurm": settings, "ray": executor == "ray", "wait": wait}
    try:
        if loaded.trials:
            with Bar(errors, len(loaded.trials.sweep.cells)) as bar:
                execute(loaded.trials.sweep, bar, **how)
            loaded = read(path, shared, sized)  # with the settings that the trials chose
        if loaded.ready.cells:
            with Bar(errors, len(loaded.ready.cells)) as bar:
                execute(loaded.ready, bar, **how)
    except KeyboardInterrupt as error:
        interrupted = error
    settled = loaded.ready
    complete = not _without_settings(loaded)
    if settled.cells:
        report = build_report(settled.name, request=settled.request)
        complete = complete and not report.sweep.unfinished
        last = last_request(settled.name)
        if last is None or last.cells == settled.cells:
            _show(report, write(report))
        else:  # by another driver, meanwhile: its page stays
            _show(report)
            console.print(
                f"The sweep {escape(settled.name)} was asked for with other cells meanwhile ({escape(last.command)}). "
                "The tables above show the cells of this command; those of the other one are in "
                f"{escape(str(home() / settled.name / 'report.html'))} and zoo report {escape(settled.name)}",
                soft_wrap=True,
            )
    for line in _without_settings(loaded):
        console.print(escape(line), soft_wrap=True)
    if interrupted:
        console.print(f"Stopped. Finished cells are kept; resume with: {escape(_again())}", soft_wrap=True)
        raise interrupted
    if not complete and wait:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]zoo report quickstart[/bold]")
def report(
    name: Annotated[str, typer.Argument(help="A sweep that has run.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="The measure that ranks and is tested (identity_recall, or else val_loss); or pairs, flops, seconds, "
            "for the default one in the order of that cost."
        ),
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
    refuse(
        "report",
        ["give one of --markdown, --latex, --json and --results"]
        * (markdown + latex + as_json + (results is not None) > 1)
        + ["--out needs --markdown or --latex"] * (out is not None and not markdown and not latex),
    )
    # An unknown sweep or measure is refused before the imports below, which take seconds.
    request = read_sweep(name)
    by, read_by = (None, by) if by in COST_SENSES else (by, None)
    if by is not None:
        measured = measures_to_rank_by(read(cell, name) for cell in request.cells)
        known = [*measured, *COST_SENSES]
        refuse(f"report {name}", [unknown("measure", by, known)] if by not in measured else [])
    from experiments.reporting.report import build_report

    found = build_report(name, by, read_by=read_by)
    if results is not None:
        from experiments.reporting.record import write_record

        write_record(found, results)
        return
    if markdown or latex:
        from experiments.reporting import tables

        text = tables.markdown(found) if markdown else tables.latex(found)
        if out is None:
            print(text)
        else:
            out.write_text(text, encoding="utf-8")
        return
    from experiments.reporting.html import write  # here: matplotlib takes a second to import

    page = write(found)
    if as_json:
        from experiments.reporting.report_json import to_json

        print(json.dumps(to_json(found)))
        return
    _show(found, page, runs=runs)


@app.command(epilog="Example: [bold]zoo power memory --difference 0.1[/bold]")
def power(
    name: Annotated[str, typer.Argument(help="A sweep that has run with two seeds or more: the pilot.")],
    difference: Annotated[
        float | None, typer.Option(help="The true difference that is to be found; 0.1 for a share.")
    ] = None,
    probability: Annotated[float, typer.Option(help="The probability with which it is to be found.")] = 0.8,
    methods: Annotated[
        int | None, typer.Option(min=2, help="How many cells the comparison has; by default those of the pilot.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="The measure; identity_recall, or else val_loss.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how many seeds a comparison needs, by what a pilot shows of the spread over seeds.

    Sweeps are simulated with that spread and judged by the tests of the report: paired t tests of all pairs, corrected
    by Holm. One cell is better than all others by the difference, and the others are alike.
    """
    refuse(
        "zoo power",
        [
            f"--probability must be above 0.05 and below 1, got {probability}" if not 0.05 < probability < 1 else "",
            f"--difference must be above 0, got {difference}" if difference is not None and not difference > 0 else "",
        ],
    )
    read_sweep(name)
    from experiments.reporting.comparison import plan_seeds
    from experiments.reporting.loading import load_sweep
    from experiments.reporting.report_json import plain_seeds
    from experiments.reporting.sentences import word_power

    sweep = load_sweep(name, by)
    plan = plan_seeds(sweep, methods, difference, probability)
    without = (
        f"no two of its methods have two seeds in common that differ in {sweep.headline.label}, so the spread over"
    )
    refuse(f"power {name}", [] if plan else [f"{without} seeds is not known. To measure it run 3 seeds or more"])
    assert plan is not None
    curve = plan.curve(SHOWN_SEEDS)
    if as_json:
        print(json.dumps(plain_seeds(plan) | {"measure": sweep.headline.name, "curve": curve}))
        return
    chance = f"{100 * probability:g} %"
    table = Table(title=f"{escape(name)}: {plan.methods} cells, {escape(sweep.headline.label)}", title_justify="left")
    table.add_column("seeds", justify="right")
    table.add_column(f"difference that is found with {chance}", justify="right")
    for seeds, smallest in curve.items():
        table.add_row(str(seeds), f"{smallest:.3g}")
    console.print(table)
    console.print(
        f"The difference of two methods varies from seed to seed by {plan.spread.sd:.3g} (standard deviation), most "
        f"between {escape(' and '.join(plan.spread.widest))}: {plan.spread.most:.3g}.",
        soft_wrap=True,
    )
    console.print(escape(word_power(sweep, plan)), soft_wrap=True)


def _show(report: Report, page: Path | None = None, *, runs: bool = False) -> None:
    """The leaderboard, what holds, what did not finish, where the page is, if it was written."""
    from experiments.analysis.formatting import p_value, signed
    from experiments.reporting.limits import MAX_NAMES
    from experiments.reporting.sentences import group_unfinished
    from experiments.reporting.terminal import terminal_tables

    console.print(*terminal_tables(report, runs=runs), sep="\n")
    significant = report.comparison.significant
    for pair in significant[:MAX_NAMES]:
        names = escape(f"{pair.a} – {pair.b}")
        console.print(f"[bold]{names}[/bold] {signed(pair.mean)}, p {p_value(pair.p_holm)} (Holm)")
    if len(significant) > MAX_NAMES:
        console.print(f"and {len(significant) - MAX_NAMES} more significant differences")
    said = report.sentences
    timing = said.timing if report.read_by == "seconds" else ""
    verdict = f"{said.verdict} {said.caution}".strip()
    for line in (said.conclusion, verdict, said.power, said.deviation, said.shortened, timing):
        if line:
            console.print(escape(line), highlight=False)
    for names, result in group_unfinished(report.sweep).items():
        console.print(f"[red]{escape(names)}[/red], {result.state}: {escape(result.reason or '')}", soft_wrap=True)
    if page is not None:
        console.print(f"Report: {escape(str(page))}", soft_wrap=True)


def _one_run(result: Result, title: str) -> Table:
    from experiments.analysis.formatting import giga, number, percent

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for key, value in (
        ("status", result.state),
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
        table.add_row(escape(key), escape(value))
    return table


def _print_forecast(forecast: Forecast, as_json: bool) -> None:
    from experiments.sweep.dry_run import NOTES

    if as_json:
        print(json.dumps(forecast.to_json()))
        return
    console.print(*forecast.tables(), sep="\n")
    for note in NOTES:
        console.print(f"[dim]{escape(note)}[/dim]")


def _without_settings(sweep: Sweep) -> list[str]:
    """Which cells have no runs, because none of their settings was chosen, one line each kind."""
    from experiments.reporting.limits import join_names

    trials, lines = sweep.trials, []
    if trials and trials.failed:
        lines.append(
            f"{join_names([*trials.failed])}: no trial ended with a score, so no setting was chosen and nothing else "
            f"was run; zoo report {trials.sweep.name} has the reasons"
        )
    if trials and trials.waiting:
        lines.append(
            f"{join_names([*trials.waiting])}: trials are left to run; the same command goes on with them, and then "
            "runs the best settings"
        )
    return lines


def _cannot_start(cells: Sequence[Cell]) -> list[str]:
    """Why some cells cannot start on this very machine, each reason once."""
    from experiments.config.resolve import cannot_start

    return list(dict.fromkeys(reason for cell in cells for reason in cannot_start(cell.config)))


def _machine_dependent(cells: Sequence[Cell]) -> list[str]:
    """Why ids of cells that run on other machines would not say what they compute.

    Here their precision is the default, and so no part of the id; on a machine with a GPU the default is another.
    """
    from experiments.config.resolve import is_default_precision

    return [
        f"cell {cell.name}: trainer.precision is {cell.config['trainer']['precision']} with trainer.accelerator auto, "
        "which may be another device where the cell runs; set trainer.accelerator to cpu or gpu"
        for cell in cells
        if cell.config["trainer"].get("accelerator", "auto") == "auto" and is_default_precision(cell.config["trainer"])
    ]


def _again() -> str:
    """The command line as the user typed it."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
