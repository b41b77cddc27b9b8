"""Write docs/zoo.md and its pictures from what the method classes declare.

Run `python -m experiments.tools.method_catalogue`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

import sparse_zoo as zoo
from experiments.reporting.pictures import FILM, simulated
from sparse_zoo.attention import Branch
from sparse_zoo.picture import PAPER, picture

DOCS = Path(__file__).parents[2] / "docs"
HEADS, HEAD_DIM = 8, 64
PIXELS, GAP, COLOURS = 200, 12, 16

INTRODUCTION = f"""# Catalogue of methods

Every built-in method on one page: a table, then rule, paper, our choices and a picture for each.
`python -m experiments.tools.method_catalogue` writes this page from what the classes declare.

| command | what it prints |
|---|---|
| `zoo list NAME` | settings of one method with their defaults |
| `zoo cost NAME` | attended pairs and FLOPs at a size that you choose |
| `zoo map NAME` | a larger drawing of the mask |

Columns of the table:

- **who -> whom**: what chooses, and what it chooses.
- **chosen by**: the score behind the choice; empty where the layout alone decides.
- **branches**: what is summed: softmaxes over tokens, softmaxes over pooled tokens (coarse), terms outside a softmax.
- **parameters**: parameters that one layer gains with {HEADS} heads of {HEAD_DIM} channels, width {HEADS * HEAD_DIM}.
- **trained**: how the paper trains with the method, if it does. Every method trains here.
- **knob**: the setting that controls density, from its least to its most.
- **claim**: the paper's own figure, not ours. The README and `LOG.md` hold what was measured here.
"""

PICTURES = """## The methods

Each picture shows one softmax over tokens, for the first head: queries from top to bottom, keys from left to right, in
a film of 12 shots. Orange marks text, thin lines mark cuts; darker means that more of the pairs are attended. Queries
and keys are simulated, the same for all methods (`zoo map`), with the small settings of the conformance suite.
"""


def methods() -> list[str]:
    """Names of the built-in methods, without plug-ins: dense first, then in alphabetical order."""
    own = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]
    return sorted(own, key=lambda name: (name != "dense", name))


def page() -> str:
    """The text of docs/zoo.md."""
    titles = ("method", "who -> whom", "chosen by", "branches", "parameters", "trained", "knob", "causality", "claim")
    table = [titles, ("---",) * len(titles), *map(_row, methods())]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([INTRODUCTION, *lines, "", PICTURES, *map(_section, methods())])


def drawing(name: str) -> Image.Image:
    """A method's softmaxes over tokens side by side, in few colours, so that the file stays small."""
    plans = [branch.plan for branch in _branches(name) if isinstance(branch, Branch) and branch.k is None]
    images = [picture(plan, FILM, pixels=PIXELS) for plan in plans]
    gap = torch.tensor(PAPER, dtype=torch.uint8).expand(len(images[0]), GAP, 3)
    beside = torch.cat([part for image in images for part in (gap, image)][1:], dim=1)
    return Image.fromarray(beside.numpy()).quantize(COLOURS, dither=Image.Dither.NONE)


def _row(name: str) -> tuple[str, ...]:
    cls = zoo.get(name)
    card, knob = cls.card, cls.knob
    assert card is not None, f"{name} has no card"
    attention = zoo.build(name, heads=HEADS, head_dim=HEAD_DIM, dim=HEADS * HEAD_DIM)
    parameters = sum(parameter.numel() for parameter in attention.parameters())
    return (
        f"[`{name}`](#{name})",
        card.granularity,
        card.chosen_by or "–",
        _kinds(name),
        f"{parameters:,}" if parameters else "–",
        card.trained,
        f"`{knob.setting}` {_plain(knob.low)} … {_plain(knob.high)}" if knob else "–",
        attention.causality or "–",
        card.claim,
    )


def _section(name: str) -> str:
    cls = zoo.get(name)
    assert cls.card is not None
    text = (inspect.getdoc(cls) or "").partition("\nArgs:")[0].strip()
    return f"### {name}\nPaper: {cls.card.paper}.\n\n{text}\n\n![{name}](zoo/{name}.png)\n"


def _kinds(name: str) -> str:
    kinds = Counter(
        "term"
        if not isinstance(branch, Branch)
        else f"softmax over {len(branch.key_sets)} key sets"
        if branch.segments
        else "softmax"
        if branch.k is None
        else "coarse softmax"
        for branch in _branches(name)
    )
    return " + ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in kinds.items())


def _branches(name: str) -> list[Branch | zoo.Term]:
    call = simulated()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _, heads, _, head_dim = call.q.shape
        attention = zoo.build(name, heads=heads, head_dim=head_dim, dim=head_dim, **zoo.get(name).small).eval()
        return attention.branches(replace(call, features=attention.features(cast(Tensor, call.hidden))))


def _plain(value: object) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


if __name__ == "__main__":
    (DOCS / "zoo").mkdir(exist_ok=True)
    for name in methods():
        drawing(name).save(DOCS / "zoo" / f"{name}.png", optimize=True)
    (DOCS / "zoo.md").write_text(page(), encoding="utf-8")
