"""Imports go one way: experiments -> lit_modules, datamodules -> sparse_zoo -> torch."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import sparse_zoo as zoo
from experiments import __main__ as command

ROOT = Path(__file__).parent.parent
ROOMS = ("experiments", "lit_modules", "datamodules", "sparse_zoo")
MAY_IMPORT = {
    "experiments": {"lit_modules", "datamodules", "sparse_zoo"},
    "lit_modules": {"sparse_zoo"},
    "datamodules": {"sparse_zoo"},
    "sparse_zoo": set(),
}


def imported(file: Path, *, types: bool = True) -> set[str]:
    """What a file imports, at its top and inside functions; without `types`, not what type checkers alone read."""
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in node.body
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        tops = {name.split(".")[0] for name in imported(file)}
        assert not tops & (set(ROOMS) - MAY_IMPORT[room] - {room}), file
        if room == "sparse_zoo":
            extra = {"pytest", "hypothesis"} if file.parent.name == "testing" else set()  # inside functions only
            # Inside functions, but for device.py, which functions import.
            extra |= {"triton"} if file.parent.name == "triton" or file.name == "host_time.py" else set()
            extra |= {"cudnn"} if file.match("kernels/triton/cudnn.py") else set()
            assert tops <= {"torch", "sparse_zoo", *sys.stdlib_module_names, *extra}, (file, tops)
        if "mlflow" in tops:
            assert file.relative_to(ROOT).as_posix() == "experiments/tracking/mlflow_logger.py"


# Each sub-package of `experiments` imports itself and those before it.
ORDER = ("tracking", "analysis", "config", "reporting", "sweep", "execution", "inspection", "tools", "cli")


def modules() -> dict[str, Path]:
    files = (file.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): ROOT / file for file in files}


def test_experiments_has_sub_packages_that_import_downwards() -> None:
    assert {file.stem for file in (ROOT / "experiments").glob("*.py")} == {"__init__", "__main__", "escape", "redact"}
    assert {file.parent.name for file in (ROOT / "experiments").glob("*/__init__.py")} == set(ORDER)
    for name, file in modules().items():
        inside, *below = name.split(".")
        if inside != "experiments" or below == ["__main__"]:
            continue
        allowed = set(ORDER[: ORDER.index(below[0]) + 1]) if below and below[0] in ORDER else set()
        known = {x.split(".")[1] for x in imported(file) if x.startswith("experiments.")} & set(ORDER)
        assert known <= allowed, f"{file} imports {known - allowed}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports inside functions count too: none hides a circle. A package's own name stands for what it collects."""
    known = {name: file for name, file in modules().items() if file.name != "__init__.py"}
    graph = {name: imported(file, types=False) & set(known) - {name} for name, file in known.items()}
    while leaves := {name for name, needs in graph.items() if not needs & set(graph)}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, {name: sorted(needs & set(graph)) for name, needs in graph.items()}


def test_folders_of_data_hold_no_code() -> None:
    for folder in ("configs", "sweeps", "results"):
        assert not [*(ROOT / "experiments" / folder).rglob("*.py")]


def test_methods_and_kernels_do_not_know_each_other() -> None:
    for file in (ROOT / "sparse_zoo" / "methods").glob("*.py"):
        others = {f"sparse_zoo.methods.{f.stem}" for f in file.parent.glob("*.py")} - {
            f"sparse_zoo.methods.{file.stem}"
        }
        found = {name for name in imported(file) if name.startswith(("sparse_zoo.kernels", *others))}
        assert not found or file.stem == "__init__", (file, found)
    for file in (ROOT / "sparse_zoo" / "kernels").rglob("*.py"):
        assert not {name for name in imported(file) if name.startswith(("sparse_zoo.methods", "sparse_zoo.attention"))}


def torch_alone(folder: Path) -> None:
    """Link what torch's own metadata demands into a folder."""
    todo, done = ["torch"], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            target = Path(str(package.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
        for line in package.requires or []:
            if "extra ==" not in line and ("platform_system" not in line or "Linux" in line):
                todo.append(re.split(r"[ ;<>=!~\[]", line)[0])


def test_the_package_needs_torch_alone(tmp_path: Path) -> None:
    """Every method, forward and backward, and the suite, in a process that can import nothing else."""
    torch_alone(tmp_path)
    (tmp_path / "sparse_zoo").symlink_to(ROOT / "sparse_zoo")
    code = """
import torch, sparse_zoo as zoo
film = zoo.Layout.film([zoo.Shot(2, 2, 2, 1)])
q = torch.randn(1, 2, len(film), 8, requires_grad=True)
for name in zoo.names():
    attention = zoo.build(name, heads=2, head_dim=8, dim=4)
    attention(q, q, q, film, hidden=torch.randn(1, len(film), 4)).out.sum().backward()
from sparse_zoo import testing
testing.check_method("moga", only=["output_equals_oracle", "checkpointing"])
(drawn,) = testing.check_kernel("cpu", only=["kernel_drawn_plans"])
assert (drawn.status, drawn.reason[:10]) == ("skipped", "hypothesis"), drawn
try:
    import lightning
except ImportError:
    print("ran", len(zoo.names()))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    own = [name for name in zoo.names() if zoo.get(name).__module__.startswith("sparse_zoo.methods.")]
    assert done.stdout.split() == ["ran", str(len(own))]


def test_without_the_extra_train_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "NEEDED", (*command.NEEDED, "not_there_a", "not_there_b"))
    with pytest.raises(SystemExit, match="2"):
        command.main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("Error: zoo: not_there_a, not_there_b not installed")
    assert "pip install 'sparse-attention-zoo[train]'" in said


@pytest.mark.slow
def test_the_base_install_demands_torch_alone(tmp_path: Path) -> None:
    """A wheel of the tree beside torch and nothing else: the package imports, and the command names its extra."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "tree"
    source.mkdir()
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    alone = tmp_path / "alone"
    subprocess.run([*pip, "install", "--no-deps", "--target", alone, wheel], check=True)
    (metadata,) = alone.glob("*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert f"Version: {zoo.__version__}" in lines
    assert "Name: sparse-attention-zoo" in lines
    demands = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [re.split(r"[ <>=]+", line)[1] for line in demands] == ["torch"]
    torch_alone(alone)
    code = "import sparse_zoo; print(sparse_zoo.__file__); import experiments.__main__ as c; c.main()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(alone)},
    )
    assert done.stdout.startswith(str(alone))
    assert done.returncode == 2, done.stderr
    assert "needs the extra train" in done.stderr
    for data in (
        "configs/base.yaml",
        "sweeps/quickstart.yaml",
        "reporting/templates/report.html.j2",
        "tools/baselines.py",
    ):
        assert (alone / "experiments" / data).is_file()
