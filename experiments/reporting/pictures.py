"""Pictures of plans as files: of a small film for `zoo map`, of what a run ended with for its report."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_zoo as zoo
from experiments.escape import visible
from sparse_zoo.diagnostics import Diagnosis, diagnose, loops
from sparse_zoo.picture import INK, PAPER, picture

HEADS, HEAD_DIM = 2, 16
FRAMES = (2, 1, 2, 2, 1, 2, 2, 2, 1, 3, 2, 3)
FILM = zoo.Layout.film([zoo.Shot(frames, 4, 6, text=3) for frames in FRAMES], caption=4)
# What each shot shows: its subject and its scene. Shots 9 and 11 show what no other shot does.
SUBJECTS = (0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 3)
SCENES = (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 0, 3)
SIMULATED = (
    "Queries and keys are simulated, the same for every method: shots share subjects and scenes,"
    " and shots 9 and 11 show what no other does."
)
LOOP = (201, 42, 42)
BLANK, HATCH = (228, 230, 232), (190, 194, 200)
QUIET = "#6b7280"
ACROSS = 6  # shots in a line of frames
NUMBERS = 16  # a matrix of more shots has no room for its counts


@dataclass(frozen=True)
class Map:
    """One method on the small film: what ran, densities by branch and in all, diagnoses."""

    method: str
    settings: dict[str, Any]
    result: zoo.Result
    densities: list[float]
    density: float
    found: list[Diagnosis]

    def branches(self) -> list[dict[str, Any]]:
        """Of each branch its density and figures; `shots`, picks by shot × shot over all heads; and the loops in them.

        The last two are None where nothing is routed, the figures missing where keys are pooled.
        """
        rows = []
        for i, density in enumerate(self.densities):
            figures = next((one.scalars() for one in self.found if one.branch == i), {})
            shots = _picks(self.found, i)
            routed = (
                {"shots": None, "loops": None} if shots is None else {"shots": shots.tolist(), "loops": loops(shots)}
            )
            rows.append({"branch": i + 1, "density": density, **figures, **routed})
        return rows

    def to_json(self) -> dict[str, Any]:
        """{"method", "settings", "tokens", "density", "loops", "branches"}; `loops` are those of all branches."""
        rows = self.branches()
        named = {"method": self.method, "settings": self.settings, "tokens": len(FILM), "density": self.density}
        return {**named, "loops": [loop for row in rows for loop in row["loops"] or []], "branches": rows}

    def save(self, path: Path) -> Path:
        """The page as PNG: token maps, who routed to which shot, groups over frames where tokens are grouped."""
        maps = _of_tokens(self.result)
        branches = (_picks(self.found, i) for i in range(len(self.densities)))
        routed = [shots for shots in branches if shots is not None]
        groups = [labels for plan in maps.values() if (labels := _groups(plan)) is not None]
        panels = len(maps) + 2 * len(routed)
        columns = min(3, panels)
        rows = math.ceil(panels / columns)
        width, heights = 4.3 * columns, [4.3] * rows + [2.2] * len(groups)
        figure = _figure(width, sum(heights) + 0.9)
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        axes = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(panels)]
        for axis, (branch, plan) in zip(axes, maps.items(), strict=False):
            _draw_map(axis, plan, self._title(branch))
        for i, counts in enumerate(routed):
            matrix, circles = axes[len(maps) + 2 * i], loops(counts)
            _draw_shots(matrix, counts)
            told = textwrap.wrap(f"loops: {', '.join(map(loop_text, circles)) or 'none'}", 56)
            # The loops have lines of their own, below, because both together are wider than the matrix.
            matrix.set_title("picks by shot (darker: more of a row)" + "\n" * len(told), fontsize=9, loc="left")
            matrix.set_title("\n".join(told), fontsize=9, loc="right", color=_rgb(LOOP) if circles else QUIET)
            _draw_arcs(axes[len(maps) + 2 * i + 1], counts)
        for i, labels in enumerate(groups):
            _draw_groups(figure.add_subplot(grid[rows + i, :]), labels)
        plain = (f"{key}={json.dumps(x, separators=(',', ':'))}" for key, x in self.settings.items())
        title = textwrap.wrap(visible(" ".join([self.method, *plain]).replace('"', "")), 40 * columns)
        figure.suptitle("\n".join(title), x=0.012, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        note = "\n".join(textwrap.wrap(SIMULATED, 68 * columns))
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color=QUIET)
        return _write(figure, path)

    def _title(self, branch: int) -> str:
        named = f"branch {branch + 1}: " if len(self.densities) > 1 else ""
        return f"{named}{100 * self.densities[branch]:.1f} % of pairs"


def sample_map(method: str, settings: Mapping[str, Any]) -> Map:
    """Run a method on the small film; raises `ZooError` as `zoo.build` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = zoo.build(method, heads=HEADS, head_dim=HEAD_DIM, dim=HEAD_DIM, **settings).eval()
    call = simulated()
    with torch.no_grad():
        result = attention.run(call)
    densities = [plan.cost(HEAD_DIM, layout=FILM, batch=1, heads=HEADS).density for plan in result.plans]
    found = diagnose(call, result.plans)
    return Map(method, dict(settings), result, densities, result.cost().density, found)


def simulated() -> zoo.Call:
    """Tokens that see their shot's subject (a block in the middle of each frame) or its scene, captions both."""
    draws = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=draws)).Q * 4
    shot = FILM.shot
    subject, scene = (directions[torch.tensor(x)][shot] for x in (SUBJECTS, [4 + s for s in SCENES]))
    inside = (FILM.row >= 1) & (FILM.col >= 1) & (FILM.col < 5)
    sight = torch.where(inside[:, None], subject, scene)
    sight = torch.where(FILM.is_text[:, None], (subject + scene) / 2, sight)
    sight = torch.where(shot[:, None] < 0, 0.0, sight)
    noise = torch.randn(3, 1, HEADS, len(FILM), HEAD_DIM, generator=draws)
    q, k, v = sight + 0.8 * noise
    return zoo.Call(q, k, v, FILM, hidden=sight[None] + 0.5 * noise[0, :, 0], step=0)


def of_results(results: Sequence[zoo.Result], folder: Path) -> list[dict[str, str]]:
    """Write the plans of every layer's branches, first batch item and head: [{"file", "label"}], in order.

    Plans over pooled queries or keys are left out.
    """
    written = []
    for layer, result in enumerate(results):
        for branch, plan in _of_tokens(result).items():
            label = f"layer {layer + 1}" + (f", branch {branch + 1}" if len(result.plans) > 1 else "")
            path = save(picture(plan, result.layout), folder / f"plan-{layer + 1}-{branch + 1}.png")
            written.append({"file": path.name, "label": label})
    return written


def of_routing(layers: Sequence[Sequence[Diagnosis]], folder: Path) -> list[dict[str, str]]:
    """Write who routed to which shot, first batch item, all heads, of every layer's routed branches."""
    written = []
    for layer, found in enumerate(layers):
        for branch in sorted({one.branch for one in found}):
            counts = _picks(found, branch)
            if counts is not None:
                figure = _figure(2.6, 2.6)
                _draw_shots(figure.add_subplot(), counts, numbers=False)  # the report shows it small
                path = _write(figure, folder / f"shots-{layer + 1}-{branch + 1}.png")
                told = ", ".join(map(loop_text, loops(counts)))
                label = f"layer {layer + 1}, picks by shot" + (f", loops {told}" if told else "")
                written.append({"file": path.name, "label": label})
    return written


def loop_text(loop: Sequence[int]) -> str:
    """`9 <-> 11` for two shots, `3 -> 5 -> 8 -> 3` for more."""
    return f"{loop[0]} <-> {loop[1]}" if len(loop) == 2 else " -> ".join(map(str, [*loop, loop[0]]))


def save(image: Tensor, path: Path) -> Path:
    """A uint8 (H, W, 3) tensor as PNG."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, image.numpy())
    return path


def _of_tokens(result: zoo.Result) -> dict[int, zoo.Plan]:
    """Plans by branch; those over pooled queries or keys have no place on a map of tokens."""
    plans, length = [plan.first_segment for plan in result.plans], len(result.layout)
    return {branch: plan for branch, plan in enumerate(plans) if plan.shape == (length, length)}


def _picks(found: Sequence[Diagnosis], branch: int) -> Tensor | None:
    """Picks by shot (S, S) of a branch, all its parts and heads, first batch item; None where it routes nothing."""
    counts = [one.routing.shots[0].sum(0).cpu() for one in found if one.branch == branch and one.routing is not None]
    return torch.stack(counts).sum(0) if counts else None


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=_rgb(PAPER))
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.1, h_pad=0.1)
    return figure


def _write(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _draw_map(axis: Any, plan: zoo.Plan, title: str) -> None:
    axis.imshow(picture(plan, FILM, pixels=640).numpy(), interpolation="antialiased")
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("keys", fontsize=8)
    axis.set_ylabel("queries", fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _draw_shots(axis: Any, counts: Tensor, *, numbers: bool = True) -> None:
    """A matrix (S, S): rows choose, columns are chosen; colour is the share of the row, red frames are loops."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colours = LinearSegmentedColormap.from_list("ink", [_rgb(PAPER), _rgb(INK)])
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    size = len(counts)
    axis.imshow(share.sqrt().numpy(), cmap=colours, vmin=0, vmax=1)
    for a in range(size):
        if not counts[a, a]:  # no piece of the own shot can be picked where the shot is attended anyhow
            own = Rectangle((a - 0.5, a - 0.5), 1, 1, fc=_rgb(PAPER), ec=_rgb(HATCH), lw=0, hatch="/////")
            axis.add_patch(own)
        for b in range(size if numbers and size <= NUMBERS else 0):
            if round(float(counts[a, b])):
                colour = "white" if share[a, b] > 0.3 else _rgb(INK)
                axis.text(b, a, f"{counts[a, b]:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    for loop in loops(counts):
        for a, b in zip(loop, [*loop[1:], loop[0]], strict=True):
            axis.add_patch(Rectangle((b - 0.5, a - 0.5), 1, 1, fill=False, ec=_rgb(LOOP), lw=2, zorder=3))
    ticks = range(0, size, math.ceil(size / NUMBERS))
    axis.set_xticks(ticks, labels=map(str, ticks), fontsize=7)
    axis.set_yticks(ticks, labels=map(str, ticks), fontsize=7)
    axis.tick_params(length=0)
    axis.set_xlabel("shot that is chosen", fontsize=8)
    axis.set_ylabel("shot that chooses", fontsize=8)
    axis.spines[:].set_color(_rgb(BLANK))


def _draw_arcs(axis: Any, counts: Tensor) -> None:
    """Shots on a line; a shot's arcs to earlier shots above, to later ones below, as wide as their share."""
    from matplotlib.patches import FancyArrowPatch

    others = counts * ~torch.eye(len(counts), dtype=torch.bool)
    share = others / others.sum(-1, keepdim=True).clamp(min=1)
    red = {pair for loop in loops(counts) for pair in zip(loop, [*loop[1:], loop[0]], strict=True)}
    for a, b in (share > 0.08).nonzero().tolist():
        looped = (a, b) in red
        arrow = FancyArrowPatch(
            (a, 0),
            (b, 0),
            connectionstyle="arc3,rad=0.9",
            arrowstyle="-|>",
            mutation_scale=7,
            shrinkA=7,
            shrinkB=7,
            lw=0.4 + 4 * float(share[a, b]),
            color=_rgb(LOOP if looped else INK),
            alpha=0.95 if looped else 0.2 + 0.6 * float(share[a, b]),
            zorder=2 if looped else 1,
        )
        axis.add_patch(arrow)
    for shot in range(len(counts)):
        ring = _rgb(LOOP) if any(shot in pair for pair in red) else _rgb(INK)
        axis.plot(shot, 0, "o", ms=13, mfc=_rgb(PAPER), mec=ring, mew=1.2, zorder=3)
        axis.text(shot, 0, str(shot), ha="center", va="center", fontsize=7, color=ring, zorder=4)
    half = len(counts) / 2
    axis.set(xlim=(-0.8, len(counts) - 0.2), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
    axis.text(-0.6, 0.92 * half, "above: earlier shots", fontsize=8, color=QUIET)
    axis.text(-0.6, -0.96 * half, "below: later shots", fontsize=8, color=QUIET)
    axis.set_title("picks of other shots, 8 % of a row and more", fontsize=9, loc="left")
    axis.patch.set_visible(False)
    axis.spines[:].set_visible(False)


def _draw_groups(axis: Any, labels: Tensor) -> None:
    """The small film frame by frame, shots apart, each token in the colour of its group; captions below."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    count = int(labels.max()) + 1
    spread = torch.arange(count) if count <= 10 else torch.linspace(0, 1, count)
    colours = colormaps["tab10" if count <= 10 else "turbo"](spread.numpy())
    palette = torch.tensor([*([int(255 * x) for x in colour[:3]] for colour in colours), BLANK])
    (film,) = FILM.films
    lines = [film.shots[i : i + ACROSS] for i in range(0, len(film.shots), ACROSS)]
    width = max(sum(shot.frames * (shot.cols + 1) + 1 for shot in line) for line in lines)
    height = film.shots[0].rows + 4  # of a line: a frame, a gap, a caption, room for the shot's number
    canvas = torch.tensor(PAPER).repeat(height * len(lines), width, 1)
    token, number = film.caption, 0
    for top, line in zip(range(0, len(canvas), height), lines, strict=True):
        left = 0
        for shot in line:
            here = palette[labels[token : token + len(shot)]]
            caption = top + shot.rows + 1
            canvas[caption, left : left + shot.text] = here[: shot.text]
            axis.text(left + shot.text + 0.2, caption, f"shot {number}", fontsize=8, va="center")
            for frame in here[shot.text :].view(shot.frames, shot.rows, shot.cols, 3):
                canvas[top : top + shot.rows, left : left + shot.cols] = frame
                left += shot.cols + 1
            left, token, number = left + 1, token + len(shot), number + 1
    axis.imshow(canvas.numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title("groups of tokens in each frame; beside the shot's number, its caption", fontsize=9, loc="left")
    handles = [Patch(color=_rgb(palette[i].tolist()), label=f"group {i + 1}") for i in range(count)]
    handles.append(Patch(color=_rgb(BLANK), label="in no group"))
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    axis.legend(handles=handles, **place, ncols=6, fontsize=8, frameon=False, handlelength=1, borderpad=0)


def _groups(plan: zoo.Plan) -> Tensor | None:
    """The group of each token (L,), -1 for none, of the first item and head, where values sorted tokens into groups."""
    for part in plan.parts:
        if part.routed and part.grouping:
            return part.keys.piece_of[0, 0].cpu()
    return None


def _rgb(colour: Sequence[int]) -> tuple[float, ...]:
    return tuple(x / 255 for x in colour)
