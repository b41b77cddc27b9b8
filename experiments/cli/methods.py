"""Commands that look at methods by themselves: settings, conformance, maps, cost, speed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from experiments.cli.shell import AsJson, Plugin, app, console, errors, load_plugins, plain, unfit_picture, unwritable
from experiments.config.names import misspelt_choices, misspelt_match, misspelt_methods, parse
from experiments.config.sections import DATA, SECTIONS, Match, fields
from experiments.escape import for_terminal as escape
from experiments.sweep.schema import SweepFile
from sparse_zoo.errors import refuse, unknown

if TYPE_CHECKING:
    from sparse_zoo import Setting

# What zoo settings shows, by section; data by the name of the datamodule.
TABLES: dict[str, type] = {**SECTIONS, "match": Match, **DATA, "sweep": SweepFile}


@app.command("list", epilog="Example: [bold]zoo list moc[/bold], or [bold]zoo list --plugin my_method.py[/bold]")
def list_(
    methods: Annotated[list[str] | None, typer.Argument(help="Show the settings of these.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show methods, a line each, and kernels with the reasons where one cannot run here; of methods named the settings.

    --json has the settings of all.
    """
    refuse("zoo list", misspelt_methods(((name, ()) for name in methods or []), plugins=bool(plugin)))
    load_plugins(plugin)
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
                    key: {"default": plain(setting.default), "type": setting.type, "doc": setting.doc}
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
            console.print(f"\n[bold]{name}[/bold]  {escape(zoo.summary(name))}")
            console.print(_settings({key: own for key, own in zoo.settings(name).items() if key not in shared}))
        console.print("[bold]every method[/bold]")
        console.print(_settings(shared))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=2 + max(map(len, names)))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name in names:
        table.add_row(f"  [cyan]{name}[/cyan]", escape(zoo.summary(name)))
    console.print("[bold]methods[/bold] (zoo list NAME shows its settings)")
    console.print(table)
    table = Table.grid(padding=(0, 2))
    for name, reasons in kernels.items():
        table.add_row(
            f"  [cyan]{name}[/cyan]", "[green]runs here[/green]" if not reasons else escape("; ".join(reasons))
        )
    console.print("\n[bold]kernels[/bold]")
    console.print(table)
    console.print('\n[bold]kernel="auto" on an H100[/bold], where all packages are there')
    console.print(_on_h100())


@app.command("settings", epilog="Example: [bold]zoo settings optim[/bold], then [bold]zoo train optim.lr=1e-3[/bold]")
def settings_(
    sections: Annotated[list[str] | None, typer.Argument(metavar="[SECTION]...", help=f"{', '.join(TABLES)}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a config and a sweep file may hold: each setting with its type, default and meaning.

    A config's settings are given as SECTION.NAME=VALUE to zoo train, or under SECTION in a file. The settings of a
    method, which stand under attention, are shown by zoo list METHOD.
    """
    refuse("zoo settings", [unknown("section", name, TABLES) for name in sections or [] if name not in TABLES])
    found = {name: fields(TABLES[name]) for name in sections or TABLES}
    if as_json:
        print(json.dumps({name: [asdict(field) for field in own] for name, own in found.items()}))
        return
    for name, own in found.items():
        table = Table(box=box.SIMPLE_HEAD, title=f"[bold]{name}[/bold]", title_justify="left")
        for title in ("setting", "default", "type", "meaning"):
            table.add_column(title, overflow="fold")
        for field in own:
            table.add_row(field.name, escape(field.default or "required"), escape(field.type), escape(field.doc))
        console.print(table)


def _on_h100() -> Table:
    """What "auto" takes there, by dtype and head dim; needs no GPU."""
    import torch

    from sparse_zoo.kernels.automatic import H100, SHOWN, automatic

    table = Table.grid(padding=(0, 2))
    table.add_row("  head dim", *map(str, SHOWN))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        table.add_row(f"  [cyan]{name}[/cyan]", *(automatic("cuda", H100, dtype, dim) for dim in SHOWN))
    return table


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
    refuse("zoo check", misspelt_methods(((name, ()) for name in methods or []), plugins=bool(plugin)))
    load_plugins(plugin)
    import sparse_zoo as zoo
    from experiments.execution.progress import counting
    from experiments.inspection.conformance import check_methods
    from sparse_zoo.testing import Outcome, checks

    names = list(dict.fromkeys(methods or zoo.names()))
    for name in names:
        zoo.get(name)  # an unknown one is refused before the others take their time
    outcomes: list[Outcome] = []
    with counting(errors, "checks", len(names) * len(checks())) as advance:
        for outcome in check_methods(names, plugin):
            outcomes.append(outcome)
            advance(f"{outcome.method}: {outcome.check}")
    outcomes.sort(key=lambda outcome: names.index(outcome.method))
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
                console.print(f"[{colour}]{escape(text)}[/{colour}]", soft_wrap=True)
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
    own = dict(parse(text) for text in settings or [])
    refuse("zoo map", misspelt_methods([(method, own)], plugins=bool(plugin)) + unfit_picture("--out", out))
    load_plugins(plugin)
    from experiments.analysis.formatting import percent
    from experiments.reporting.pictures import loop_text, sample_map

    drawn = sample_map(method, own)
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
        loops = "nothing routed" if row["loops"] is None else ", ".join(map(loop_text, row["loops"])) or "none"
        table.add_row(str(row["branch"]), *shares, loops)
    table.add_row("all", percent(drawn.density), "", "", str(len(found["loops"])))
    console.print(table)
    console.print(f"Map: {escape(str(path.absolute()))}", soft_wrap=True)


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
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Also the most that one layer's attention holds on a GPU; none is needed."),
    ] = False,
    parallel: Annotated[
        str | None, typer.Option(help="Besides: what each device takes of a run on several, data=8,sequence=4.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(help="With --parallel: GB/s that a device sends and receives.")] = 50.0,
    speed: Annotated[float, typer.Option(help="With --parallel: TFLOP/s that a device attains.")] = 400.0,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Count what a method costs beside dense attention, without running it: pairs, FLOPs, bytes, padding.

    The method's own plan is built at the size asked for, on random queries and keys; no weights, no GPU and no L × L
    table are needed. FLOPs are of the whole VideoDiT. With --paper, the published figures are recomputed the same way
    and each is marked: it agrees, agrees under a reading that is named, or does not follow.
    """
    if paper is not None:
        given = [
            parameter.opts[0]
            for parameter in ctx.command.params
            if (source := ctx.get_parameter_source(parameter.name or "")) is not None
            and source.name == "COMMANDLINE"
            and parameter.name not in ("paper", "as_json")
        ]
        refuse(
            "zoo cost --paper",
            misspelt_choices(bool(plugin), paper=paper)
            + ([f"has the paper's methods and sizes; leave out {', '.join(given)}"] if given else []),
        )
        from experiments.execution.progress import counting
        from experiments.tools.paper_ledger import PAPERS, Ledger

        with counting(errors, "figures", len(PAPERS[paper].figures)) as advance:
            ledger = Ledger.of(paper, advance)
        if as_json:
            print(json.dumps(ledger.to_json()))
        else:
            ledger.show(console)
        return
    refuse("zoo cost", ["name a method, see zoo list, or a paper with --paper"] if method is None else [])
    assert method is not None
    own = dict(parse(text) for text in settings or [])
    refuse(
        "zoo cost",
        misspelt_methods([(method, own)], plugins=bool(plugin))
        + misspelt_choices(bool(plugin), kernel=kernel, text_mode=text_mode)
        + misspelt_match(match),
    )
    load_plugins(plugin)
    from experiments.inspection.cost import Films, compare
    from lit_modules.flops import ModelShape

    films, shape = Films(shots, frames, rows, cols, text, caption), ModelShape(dim, depth, heads, mlp_ratio, text_mode)
    if match is not None:
        from experiments.sweep.budget import solved_alone

        asked = dict([parse(match)])
        own |= solved_alone(method, own, asked, films.layout(), shape, batch=batch, every_head=every_head)
    found = compare(method, own, films, shape, batch=batch, kernel=kernel, every_head=every_head, memory=memory)
    rates = {"bandwidth": bandwidth, "speed": speed}
    if parallel is not None:
        from experiments.inspection.devices import NOTES as DEVICE_NOTES
        from experiments.inspection.devices import at_scale, read_parallel, table, to_json

        several, density = read_parallel(parallel), found.ours.attention.cost.density
        shares = at_scale(method, own, films.layout(), shape, several, density, **rates)
    if as_json:
        print(json.dumps(found.to_json() | ({} if parallel is None else {"devices": to_json(shares)})))
        return
    console.print(found.table())
    if parallel is not None:
        console.print(table(shares, several, **rates))
        for note in DEVICE_NOTES:
            console.print(f"[dim]{note}[/dim]", soft_wrap=True)
    if match is not None:
        console.print(escape(f"At {', '.join(f'{key} {plain(value)}' for key, value in own.items())}"))
    for note in found.notes:
        console.print(f"[dim]{escape(note)}[/dim]")


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
    repeats: Annotated[int, typer.Option(min=1, help="Measured turns at least; medians are given.")] = 6,
    max_repeats: Annotated[int, typer.Option(min=1, help="Turns at most, while intervals are wide.")] = 24,
    minutes: Annotated[float, typer.Option(min=0, help="No further turns after this time.")] = math.inf,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot time against length, as PNG.")] = None,
    plugin: Plugin = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure how much of the speedup that its pair count allows a method attains.

    attained: seconds of the fastest dense attention here ÷ seconds of the method, routing included, turn by turn in one
    process; bound: 1 / density. A kernel that errs against float64 gets no time. quick: every method, seconds; cpu:
    2k to 64k tokens, 15 minutes; shots: 1 to 32 shots; gpu: 180k tokens in half precision. Measure on a quiet machine:
    rows whose interval of attained ÷ bound (the median over turns, 95 %) is wider than 0.1 are marked.
    """
    refuse(
        "zoo bench",
        misspelt_methods(((name, ()) for name in method), plugins=bool(plugin))
        + misspelt_choices(bool(plugin), suite=suite, kernel=kernel, dtype=dtype)
        + unfit_picture("--plot", plot)
        + unwritable("--out", out),
    )
    load_plugins(plugin)
    import torch

    from experiments.execution.progress import counting
    from sparse_zoo import bench as speed

    device = torch.device("cuda" if torch.cuda.is_available() and suite == "gpu" else "cpu")
    rounds = speed.chosen(suite, method, tokens, kernel, dtype)
    most = max(repeats, max_repeats)
    with counting(errors, "turns", speed.events(rounds, most, device)) as progress:
        found = speed.run(rounds, repeats, device, progress, most=most, minutes=minutes)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    timed = any("failed" not in row for row in found["rows"])
    if plot is not None and timed:
        from experiments.reporting.bench import plot as draw

        draw(found, plot)
    if as_json:
        print(json.dumps(found))
    else:
        console.print(_speeds(found))
        for written in filter(None, (out, plot if timed else None)):
            console.print(f"Written: {escape(str(written.absolute()))}", soft_wrap=True)
    if any("failed" in row for row in found["rows"]):
        raise typer.Exit(1)


def _settings(settings: Mapping[str, Setting]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, setting in settings.items():
        default = "needed" if setting.required else f"= {plain(setting.default)}"
        table.add_row(f"  [cyan]{key}[/cyan]", escape(default), f"[dim]{escape(setting.doc)}[/dim]")
    return table


SPEEDS = "method", "kernel", "tokens", "pass", "ms", "dense", "attained", "÷ bound", "interval", "best", "memory"


def _speeds(found: Mapping[str, Any]) -> Table:
    from sparse_zoo.bench.host import PASS
    from sparse_zoo.bench.lines import headline, host, interval

    passes = "fwd: forward, all: forward + backward, host: its host on a GPU"
    about = f"{found['device']}, torch {found['versions']['torch']}; {passes}"
    table = Table(title=escape(about), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.caption = (
        "÷ bound: of the medians; interval: of the median over turns of dense ÷ own ÷ bound, ! where it is too wide;\n"
        "best: of the fastest turns"
    )
    if noise := headline(found["rows"]):
        console.print(f"[bold yellow]{escape(noise)}[/bold yellow]", soft_wrap=True)
    for title in SPEEDS:
        table.add_column(title, justify="left" if title in ("method", "kernel", "pass") else "right", no_wrap=True)
    for row in found["rows"]:
        names = (row["method"], row["kernel"], f"{row['tokens']:,}")
        if "failed" in row:
            console.print(f"[red]{row['method']} on {row['kernel']}[/red]: {escape(row['failed'])}", soft_wrap=True)
            continue
        if row["pass"] == PASS:
            if "seconds" in row:
                table.add_row(*names, PASS, host(row).strip())
            else:
                console.print(f"{row['method']}, host: {escape(host(row))}", soft_wrap=True)
            continue
        which = "fwd" if row["pass"] == "forward" else "all"
        times = (f"{row['seconds'] * 1e3:.1f}", f"{row['dense_seconds'] * 1e3:.1f}")
        speed = (f"{row['attained']:.2f} of {row['bound']:.2f}", f"[bold]{row['attained_over_bound']:.2f}[/bold]")
        spread = (interval(row), f"{row['fastest_over_bound']:.2f}")
        table.add_row(*names, which, *times, *speed, *spread, f"{row['peak_memory_ratio']:.2f}")
    return table
