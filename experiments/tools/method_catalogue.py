"""docs/zoo.md and its pictures, from what the classes of methods say of themselves.

`python -m experiments.tools.method_catalogue` writes them.
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

INTRODUCTION = f"""# The zoo: every method on one page

Written by `python -m experiments.tools.method_catalogue` from what the classes declare. `zoo list NAME` shows settings
with their defaults, `zoo cost NAME` counts a method at a size of yours, `zoo map NAME` draws it in more detail.

- **Who -> whom**: what chooses, of what. **Chosen by**: nothing where the layout alone decides.
- **Branches**: what is summed: softmaxes over tokens, softmaxes over pooled tokens (coarse), terms outside any softmax.
- **Parameters**: what a layer gains at {HEADS} heads of {HEAD_DIM}, {HEADS * HEAD_DIM} wide.
- **Trained**: how the paper trains with it, if it does; all of them train here.
- **Knob**: the setting that buys density, from its least to its most.
- **Claim**: the paper's own figure, not ours. What was measured here stands in the README and in `LOG.md`.
"""

PICTURES = """## The methods

Pictures: one for each softmax over tokens, of the first head; queries downwards, keys to the right, in a film of 12
shots. Orange marks text, thin lines cuts; the darker, the more of the pairs are attended. Queries and keys are
simulated, the same for all (`zoo map`); settings are the small ones of the conformance suite.
"""


def methods() -> list[str]:
    """Those of this package, without plug-ins: dense first, then by name."""
    own = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]
    return sorted(own, key=lambda name: (name != "dense", name))


def page() -> str:
    """docs/zoo.md."""
    titles = ("method", "who -> whom", "chosen by", "branches", "parameters", "trained", "knob", "causality", "claim")
    table = [titles, ("---",) * len(titles), *map(_row, methods())]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([INTRODUCTION, *lines, "", PICTURES, *map(_section, methods())])


def drawing(name: str) -> Image.Image:
    """A method's softmaxes over tokens side by side, in few colours so that the file is small."""
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
    told = (inspect.getdoc(cls) or "").partition("\nArgs:")[0].strip()
    return f"### {name}\nPaper: {cls.card.paper}.\n\n{told}\n\n![{name}](zoo/{name}.png)\n"


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
