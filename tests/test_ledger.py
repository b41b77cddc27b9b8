"""`zoo cost`: counts against dense masks, runs and torch's own counter; the papers' figures and their judge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FILMS
from tiny import OWN_AND_PREVIOUS
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

import sparse_zoo as zoo
from experiments.cli import app
from experiments.tools.paper_ledger import PAPERS, SPEEDS, Case, Figure, Fit, Ledger, Speed, judge, page, speeds
from lit_modules import VideoDiT
from lit_modules.flops import Flops, ModelShape, caption_flops, linear_flops
from lit_modules.stream import stream
from sparse_zoo.simulate import plan_bytes, random_call, simulate

FILM = zoo.Layout.film([zoo.Shot(3, 4, 4, 3), zoo.Shot(1, 5, 3), zoo.Shot(4, 4, 4, 2)], caption=2)
SHAPE: dict[str, Any] = {"heads": 2, "head_dim": 8, "dim": 16, "batch": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moc": {"top_k": 2},
    "moc_fixed": {"top_k": 2, "chunk_tokens": 7},
    "moga": {"groups": 3},
    "window": {"tile": [1, 2, 2], "window": [3, 1, 3]},
}
SMALL = ["--shots", "2", "--frames", "2", "--rows", "3", "--cols", "3", "--text", "2", "--caption", "1"]
SMALL += ["--dim", "32", "--depth", "2", "--heads", "4"]


def cost(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, ["cost", *map(str, arguments)], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_reads", ["method", "text"])
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("film", ["captioned", "packed"], indirect=True)
def test_what_is_counted_is_what_a_run_attends_to(method: str, text_reads: str, film: zoo.Layout) -> None:
    settings = {**SETTINGS[method], "text_reads": text_reads}
    found = simulate(method, film, settings=settings, kernel="reference", **SHAPE)
    torch.manual_seed(0)
    attention = zoo.build(method, heads=2, head_dim=8, dim=16, **settings).eval()
    with torch.no_grad():
        result = attention.run(random_call(attention, film, (2, 2), seed=0))
    masks = [plan.dense_mask().expand(2, 2, -1, -1) for plan in result.plans]
    assert found.branch_pairs == tuple(int(mask.sum()) for mask in masks)
    assert found.cost == result.cost()
    assert found.cost.dense_pairs == 4 * sum(len(one) ** 2 for one in film.films)
    assert found.executed == len(masks) * 4 * len(film) ** 2


def test_heads_and_batch_that_are_not_simulated_count_as_alike() -> None:
    """Equal chunks: every query reads its own shot of 8 and two others, whichever it chose."""
    film = zoo.Layout.film([zoo.Shot(2, 2, 2)] * 5)
    settings = {"top_k": 2, "chunk": "shot", "causal": None}
    found = simulate("moc", film, heads=7, head_dim=8, dim=56, batch=3, settings=settings, kernel="reference")
    assert found.simulated == (2, 2)
    assert found.cost.pairs == 3 * 7 * 40 * 24
    assert found.executed == 3 * 7 * 40 * 40
    assert found.cost.routing_flops == 3 * 8 * (2 * 7 * 40 * 5 + 7 * 40)
    routed_once = simulate("moga", film, heads=7, head_dim=8, dim=56, batch=3, settings={"groups": 3})
    assert routed_once.cost.routing_flops == 3 * 2 * 40 * 56 * 3  # for all heads together


def test_every_head_is_simulated_on_demand() -> None:
    @zoo.register("head_by_head")
    class HeadByHead(zoo.Attention):
        """Head h attends to the h + 1 first shots."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, layout: zoo.Layout) -> zoo.Plan:  # noqa: ARG002
            everyone, shots = layout.partition(), layout.partition("shot")
            heads = torch.arange(self.heads)[None, :, None, None]
            return zoo.Plan.blocks(everyone, shots, shots.shot[None, None, None] <= heads)

    film = zoo.Layout.film([zoo.Shot(1, 2, 2)] * 4)
    assert simulate("head_by_head", film, heads=4, head_dim=4, every_head=True).cost.pairs == 16 * 4 * (1 + 2 + 3 + 4)
    assert simulate("head_by_head", film, heads=4, head_dim=4).cost.pairs == 2 * 16 * 4 * (1 + 2)


@pytest.mark.parametrize("method", SETTINGS)
def test_index_tables_weigh_what_they_hold(method: str) -> None:
    """Two of each simulated, five and three counted, against the tables of five and three."""
    settings = SETTINGS[method]
    counted = simulate(method, FILM, heads=5, head_dim=8, dim=40, batch=3, settings=settings)
    attention = zoo.build(method, heads=5, head_dim=8, dim=40, **settings)
    with torch.no_grad():
        call = random_call(attention, FILM, (3, 5), seed=0)
        branches = attention.branches(call)
    parts = [part for branch in branches if isinstance(branch, zoo.Branch) for part in branch.plan.parts]
    tables = [part.edges for part in parts]
    tables += [x for part in parts for p in (part.queries, part.keys) for x in (p.offsets, p.order) if x is not None]
    held = {table.data_ptr(): table.numel() * table.element_size() for table in tables}
    assert counted.plan_bytes == sum(held.values()) > 0
    assert plan_bytes([], (1, 1), 1, 1) == 0


def test_terms_count_too() -> None:
    @zoo.register("with_a_remainder")
    class WithARemainder(zoo.Attention):
        """Own shot, and a linear remainder of 10 FLOPs a channel."""

        def branches(self, call: zoo.Call) -> list[zoo.Branch | zoo.Term]:
            own = zoo.Plan.within(call.layout.partition("shot"))
            return [zoo.Branch(own), zoo.Term(call.q, 10 * call.q.numel())]

    film = zoo.Layout.film([zoo.Shot(1, 2, 2)] * 3)
    assert simulate("with_a_remainder", film, heads=3, head_dim=8, batch=5).term_flops == 10 * 5 * 3 * 12 * 8


# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["joint", "cross"])
@pytest.mark.parametrize("film", ["captioned", "packed", "plain"], indirect=True)
def test_linear_layers_are_those_of_the_model(film: zoo.Layout, text: Any) -> None:
    """Against torch's own counter on the model, forward and backward."""
    sizes: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 2, "mlp_ratio": 3.0, "text": text}
    model = VideoDiT(**sizes, channels=3, patch=(1, 2, 1), vocabulary=5, attention={"name": "dense", "kernel": "cpu"})
    for parameter in model.parameters():  # what starts at 0 would stop gradients, not their cost; be sure all the same
        torch.nn.init.normal_(parameter, std=0.1)
    table = stream(film)
    batch = 2
    video = torch.randn(batch, len(table.video), model.patch_size)
    words = torch.zeros(batch, len(table.text), dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        out = model(video, words, torch.rand(batch), film)
    with FlopCounterMode(display=False) as backward:
        out.velocity.sum().backward()

    def products(counter: FlopCounterMode) -> int:
        matmuls = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
        return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in matmuls)

    counted = linear_flops(ModelShape(**sizes, patch_size=model.patch_size), film, batch)
    assert counted == Flops(products(forward), products(backward))
    assert counted.both == counted.forward + counted.backward


def test_captions_are_read_by_their_shots() -> None:
    """Three shots of 48, 15 and 64 tokens read captions of 3, 0 and 2, and the global one of 2."""
    shape = ModelShape(dim=24, depth=5, heads=2, text="cross")
    pairs = 48 * (3 + 2) + 15 * 2 + 64 * (2 + 2)
    assert caption_flops(shape, FILM, batch=3) == Flops(4 * 5 * 3 * 24 * pairs, 10 * 5 * 3 * 24 * pairs)
    assert caption_flops(ModelShape(dim=24, depth=5, heads=2), FILM, batch=3) == Flops(0, 0)
    assert caption_flops(shape, FILMS["plain"], batch=3) == Flops(0, 0)


# -- the command -------------------------------------------------------------------------------------------------------


def test_cost_json() -> None:
    found = json.loads(cost("moc", "top_k=1", "chunk=shot", "--batch", "2", *SMALL, "--json").stdout)
    assert found["settings"] == {"top_k": 1, "chunk": "shot"}
    tokens = 2 * (2 + 2 * 3 * 3) + 1
    assert found["layout"]["tokens"] == tokens
    dense, moc = found["dense"], found["cost"]
    assert dense["pairs"] == 2 * 4 * tokens**2
    assert dense["density"] == 1
    # Own shot of 20 and the text of the other and of the film, 3; the second shot's 20 queries choose the first's 18
    # tokens of video, the global caption all text and, causally, nothing more.
    assert moc["pairs"] == 2 * 4 * (20 * 23 + 20 * (23 + 18) + 5)
    for bill in (dense, moc):
        flops = bill["flops"]
        assert flops["forward"]["attention"] == 2 * 4 * 8 * bill["pairs"]
        assert flops["forward_backward"]["attention"] == 2 * 14 * 8 * bill["pairs"]
        for parts in flops.values():
            assert parts["model"] == sum(value for part, value in parts.items() if part != "model")
        assert bill["bytes"]["qkvo"] == 4 * 2 * 2 * tokens * 32
    assert dense["flops"]["forward"]["linear"] == moc["flops"]["forward"]["linear"]
    assert dense["executed_pairs"] == 2 * 4 * 128**2  # one tile a head
    assert "random q, k" in found["notes"][0]


def test_cost_for_people(tmp_path: Path) -> None:
    plugin = tmp_path / "own_and_previous.py"
    plugin.write_text(OWN_AND_PREVIOUS)
    shown = cost("own_and_previous_shots", "--plugin", plugin, "--text-mode", "cross", "--kernel", "reference", *SMALL)
    assert shown.exit_code == 0, shown.output
    for part in ("dense", "density", "75.00 %", "attention to captions", "linear layers", "1.33×", "random q, k"):
        assert part in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["name a method"]),
        (["mocc"], ["did you mean 'moc'?"]),
        (["moc", "topk=1"], ["did you mean 'top_k'?"]),
        (["moc", "--rows", "0", "--cols", "-1", "--text", "-1"], ["rows must", "cols must", "text must be at least 0"]),
        (["moc", "--shots", "0"], ["shots must be at least 1, got 0"]),
        (["moc", "--batch", "0"], ["batch: must be at least 1"]),
        (["moc", "--dim", "0", "--depth", "0"], ["dim must be at least 1, got 0", "depth must be at least 1"]),
        (["moc", "--dim", "33", "--heads", "2"], ["heads must divide dim"]),
        (["moc", "--text-mode", "crossed"], ["did you mean 'cross'?"]),
        (["moc", "--kernel", "cpo"], ["did you mean 'cpu'?"]),
        (["--paper", "mogaa"], ["did you mean 'moga'?"]),
        (["moc", "--paper", "moc"], ["leave out method"]),
        (["--paper", "mocc", "--rows", "3"], ["did you mean 'moc'?", "leave out --rows"]),
    ],
)
def test_refusals_say_everything(arguments: list[str], messages: list[str]) -> None:
    result = cost(*arguments)
    assert result.exit_code == 2
    for message in messages:
        assert message in result.stderr


def test_what_needs_more_than_random_values_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "by_noise.py"
    plugin.write_text(
        "import sparse_zoo as zoo\n"
        "@zoo.register('by_noise')\n"
        "class ByNoise(zoo.Attention):\n"
        "    '''Dense at high noise, own shot below.'''\n"
        "    def branches(self, call):\n"
        "        if call.noise is None:\n"
        "            raise zoo.ZooError('it plans by noise')\n"
        "        return [zoo.Branch(zoo.Plan.dense(call.layout))]\n"
    )
    result = cost("by_noise", "--plugin", plugin, *SMALL)
    assert result.exit_code == 2
    assert "cannot be planned from random q, k and hidden alone" in result.stderr
    assert "it plans by noise" in result.stderr


@pytest.mark.slow
def test_a_long_film_takes_little_memory() -> None:
    """180,000 tokens: one bool table of tokens × tokens alone would take 32 GB; all of it stays below 2."""
    code = """
import sys
from pathlib import Path
from experiments.cli import app
size = "--shots 8 --frames 25 --rows 30 --cols 30 --text 0 --caption 0 --dim 128 --heads 1 --depth 1 --json"
app(["cost", "moc", "chunk=fixed", *size.split()], standalone_mode=False)
# Not ru_maxrss, in which the memory of the process that started this one counts.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["layout"]["tokens"] == 180_000
    assert 0.14 < found["cost"]["density"] < 0.16
    assert int(done.stderr) * 1024 < 2e9


# -- the papers --------------------------------------------------------------------------------------------------------

PRINTED = {
    "moc": {
        ("headline", "sparsity"): [0.85],
        ("headline", "dense ÷ sparse FLOPs"): [7],
        ("headline", "FLOPs"): [1.7e13, 2.3e12],
        ("printed example", "FLOPs by the printed formula"): [2.32e12],
        ("multi-shot", "sparsity"): [0, 0.85],
        ("multi-shot", "FLOPs"): [1.7e13, 2.3e12],
        ("single-shot", "sparsity"): [0, 0.83],
        ("single-shot", "FLOPs"): [1.9e10, 4.1e9],
        ("Wan 1.3B", "sparsity"): [0, 0.81],
        ("chunk length", "sparsity"): [0.96, 0.92, 0.83, 0.68, 0.35],
        ("chunk length", "FLOPs"): [1.2e9, 1.7e9, 4.1e9, 6.6e9, 1.3e10],
        ("top-k", "sparsity"): [0.92, 0.88, 0.80, 0.76, 0.72],
        ("top-k", "FLOPs"): [2.1e9, 3.1e9, 5.2e9, 6.2e9, 7.2e9],
    },
    "moga": {
        ("headline", "sparsity"): [0.7125],
        ("headline", "PFLOPs"): [6.94, 2.26],
        ("durations", "PFLOPs"): [
            *(0.28, 0.88, 1.85, 3.19, 6.94),
            *(0.093, 0.34, 0.67, 1.09, 2.26),
            *(0.065, 0.25, 0.48, 0.78, 1.56),
            *(0.051, 0.21, 0.39, 0.61, 1.22),
        ],
        ("groups, 10 s", "sparsity"): [0, 0.4125, 0.6625, 0.7875, 0.8125],
        ("groups, 10 s", "PFLOPs"): [0.88, 0.59, 0.42, 0.36, 0.35],
        ("MMDiT", "tokens"): [578e3],
    },
}


def known(name: str, rows: list[dict[str, Any]]) -> None:
    """Results that can be had by hand."""

    def plain(table: str, row: str, quantity: str) -> float:
        (found,) = [r for r in rows if (r["table"], r["row"], r["quantity"]) == (table, row, quantity)]
        return float(found["plain"])

    if name == "moc":
        single = [r for r in rows if r["table"] in ("chunk length", "top-k") and r["quantity"] == "sparsity"]
        assert len(single) == 10
        for row in single:
            chunk, top_k = (int(part.split()[1]) for part in row["row"].split(", "))
            assert row["plain"] == pytest.approx(1 - (top_k + 1) * chunk / 6300, abs=0.01)
        assert plain("printed example", "m 1024, k 5, C 36, d 128", "FLOPs by the printed formula") == pytest.approx(
            4.74e11, rel=2e-3
        )
        assert plain("multi-shot", "LCT dense", "FLOPs") == 4 * 180_000**2 * 128
        # Own shot; of eight shots seven have chunks before them.
        share = (22_500 + 5 * 1280 * 7 / 8) / 180_000
        assert plain("multi-shot", "MoC", "sparsity") == pytest.approx(1 - share, abs=2e-3)
    else:
        assert plain("headline", "30 s, full", "PFLOPs") == pytest.approx(6.95, abs=5e-3)
        for groups in (2, 4, 8, 16):
            # Windows × shots, three borrowed frames a shot on average, the frame.
            share = 1 / groups + 1 / 16 + 3 / (4 * 40) + 1 / 40
            assert plain("groups, 10 s", f"M {groups}", "sparsity") == pytest.approx(1 - share, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_every_printed_figure_is_recomputed(name: str) -> None:
    """All plans of a paper at its size, from the command to the page: about ten seconds each."""
    result = cost("--paper", name, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = found["rows"]
    listed: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        listed.setdefault((row["table"], row["quantity"]), []).append(row["theirs"])
    assert listed == PRINTED[name]
    assert Counter(row["verdict"] for row in rows) == Counter(found["summary"])
    for row in rows:
        assert row["paper"] == name
        assert row["why"]
        lacks = abs(row["ours"] - row["theirs"]) if row["row"] != "fewer attention FLOPs, more than" else 0
        fits = lacks <= 0.02 * row["theirs"]
        assert fits == (row["verdict"] != "does not follow"), row
        assert (row["reading"] is not None) == (row["verdict"] == "agrees under a reading")
        assert (row["ours"] == row["plain"]) == (row["reading"] is None)
    known(name, rows)

    ledger = Ledger.of(name)  # from what was counted above
    assert ledger.to_json() == found
    written = (Path(__file__).parent.parent / "docs" / "ledger.md").read_text()
    assert ledger.markdown() in written
    assert written.startswith(page([]))
    shown = cost("--paper", name).stdout
    assert ledger.summary() in shown
    assert max(map(len, shown.splitlines())) <= 120


def figure(theirs: float, *, at_least: bool = False) -> Figure:
    return Figure("t", "r", "PFLOPs", theirs, Case("dense", (), FILM), at_least)


def test_the_rule() -> None:
    most, few = Fit("most", "t", "PFLOPs", 2, 4), Fit("few", "t", "PFLOPs", 1, 4)
    assert most.admitted
    assert not few.admitted
    assert judge(figure(100), 102, []).verdict == "agrees"
    assert judge(figure(100), 98, []).verdict == "agrees"
    assert judge(figure(100), 102.1, []).verdict == "does not follow"
    assert judge(figure(100), 97.9, []).verdict == "does not follow"
    # Relative to the printed figure, not to ours.
    assert judge(figure(98), 100, []).verdict == "does not follow"
    assert judge(figure(0), 0, []).verdict == "agrees"
    assert judge(figure(0), 1e-9, []).verdict == "does not follow"
    assert judge(figure(7, at_least=True), 9, []).verdict == "agrees"
    assert judge(figure(7, at_least=True), 6.8, []).verdict == "does not follow"

    by_reading = judge(figure(100), 50, [(few, 100.0), (most, 101.0)])
    assert (by_reading.verdict, by_reading.reading, by_reading.ours) == ("agrees under a reading", "most", 101)
    assert by_reading.plain == 50
    assert "2 of 4 rows" in by_reading.why
    assert "50" in by_reading.why
    other = Fit("other", "t", "PFLOPs", 4, 4)
    assert judge(figure(100), 50, [(most, 101.0), (other, 100.0)]).reading == "most"  # the first that fits
    assert judge(figure(100), 50, [(most, 103.0), (other, 100.0)]).reading == "other"
    assert judge(figure(100), 100, [(other, 100.0)]).reading is None  # plain goes first

    lucky = judge(figure(100), 50, [(few, 100.0)], "needs more")
    assert (lucky.verdict, lucky.ours) == ("does not follow", 50)
    assert "needs more" in lucky.why
    assert "fits this row, but only 1 of 4 rows" in lucky.why
    assert "nearest reading, 'most'" in judge(figure(100), 50, [(most, 90.0), (other, 10.0)]).why


def test_a_speedup_above_what_sparsity_allows_is_called_so() -> None:
    """LiteAttention's whole models gain more than its sparsity allows its attention alone; its attention does not."""
    lite = {x.row: x.verdict for x in SPEEDS if x.paper.startswith("LiteAttention")}
    exceeding = {row for row, verdict in lite.items() if verdict == "exceeds the bound"}
    assert exceeding == {row for row in lite if "end to end" in row}
    assert len(lite) == 6
    assert {"SpargeAttention2", "SLA2", "BSA"} <= {x.paper.partition(",")[0] for x in SPEEDS}
    just, above = (Speed("", "", "", 0.75, times) for times in (4 * 1.02, 4 * 1.021))
    assert (just.bound, just.verdict, above.verdict) == (4, "within the bound", "exceeds the bound")
    assert (Path(__file__).parent.parent / "docs" / "ledger.md").read_text().endswith("\n\n" + speeds())
