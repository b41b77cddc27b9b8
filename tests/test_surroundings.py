"""The command in surroundings that are not a developer's: another locale, no home, a pipe for a terminal."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import write_sweep_of
from rich.table import Table
from tiny import write_sweep
from typer.testing import CliRunner

from experiments.cli import app, main
from experiments.cli.shell import Screen
from experiments.sweep import preflight

ROOT = Path(__file__).parent.parent
ROOMS = ("experiments", "lit_modules", "datamodules", "sparse_zoo", "examples")

# A user id that nobody knows, without a home: what torch, MLflow and matplotlib ask is refused by the system.
ZOO = """
import os, pwd, sys
def unknown(_):
    raise KeyError("uid not found")
pwd.getpwuid = unknown
from experiments.cli import main
sys.argv = ["zoo", *sys.argv[1:]]
main()
"""
UNKNOWN = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "COLUMNS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")


def zoo(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in UNKNOWN and not key.startswith("LC_")}
    return subprocess.run(
        [sys.executable, "-c", ZOO, *arguments],
        cwd=folder,
        env=kept
        | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "ZOO_HOME": "", "MLFLOW_TRACKING_URI": "", **variables},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def leaves_the_encoding_open(call: ast.Call) -> bool:
    """Whether a call opens text, or reads that of a process, in whatever encoding the locale has."""
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    name, owner = "", ""
    if isinstance(call.func, ast.Attribute):
        name, owner = call.func.attr, ast.unparse(call.func.value)
    elif isinstance(call.func, ast.Name):
        name = call.func.id
    if name in ("read_text", "write_text"):
        return True
    bytes_alone = owner in ("av", "Image", "archive", "tarfile") or (owner, name) == ("os", "open")
    if name in ("open", "fdopen") and not bytes_alone:
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        modes = [x.value for x in given if isinstance(x, ast.Constant) and re.fullmatch("[rwabxt+]+", str(x.value))]
        return not any("b" in str(mode) for mode in modes)
    return any(x.arg == "text" and isinstance(x.value, ast.Constant) and x.value.value is True for x in call.keywords)


def test_every_file_is_opened_in_a_stated_encoding() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Call) and leaves_the_encoding_open(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("path.read_text()", True),
        ("path.open('a')", True),
        ("open(path)", True),
        ("subprocess.run(x, text=True)", True),
        ("path.open('rb')", False),
        ("path.write_text(x, encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("Shot(1, 2, 3, text=4)", False),
    ],
)
def test_open_encodings_are_seen(code: str, wanted: bool) -> None:
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert leaves_the_encoding_open(call) is wanted


@pytest.mark.slow
def test_a_sweep_runs_in_an_ascii_locale_for_an_unknown_user(tmp_path: Path) -> None:
    """A report with signs that ASCII has not, tables that no edge cuts, and no traceback."""
    path = write_sweep(tmp_path / "s.yaml", about="60 × 60 — größer", cells={"a": {}})
    done = zoo(
        "sweep", path.name, folder=tmp_path,
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    page = (tmp_path / "runs" / "s" / "report.html").read_text(encoding="utf-8")
    assert "60 × 60 — größer" in page
    assert page.rstrip().endswith("</html>")
    assert "1 of 1 cells finished" in done.stdout
    assert "…" not in done.stdout
    assert done.stdout.isascii()


ROWS = '{"path": "größe.mp4", "caption": "Ein Bär — 60 × 60"}\n'
COMMANDS = [
    ("list", 0), ("settings trainer", 0), ("cost moc --frames 2 --rows 4 --cols 4", 0), ("map moc --out größe.png", 0),
    ("report größe", 0), ("report größe --json", 0), ("report größe --markdown", 0), ("report größe --latex", 0),
    ("report größe --markdown --out größe.md", 0), ("sweep größe.yaml --dry-run", 0), ("data check größe.jsonl", 1),
    ("train trainer.max_steps=größe", 2), ("sweep Öl", 2), ("check größe", 2), ("sample größe", 2), ("--help", 0),
]  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_command_writes_to_a_terminal_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "Läufe"))
    monkeypatch.setattr(preflight, "TIMED", 1)
    write_sweep_of("größe", {"größe × 2": (0.9, 0.8)}, {"größe × 2": {"name": "dense"}})
    write_sweep(Path("größe.yaml"), about="60 × 60 — größer", cells={"größe": {}})
    Path("größe.jsonl").write_text(ROWS, encoding="utf-8")
    for command, code in COMMANDS:
        shown, told = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", shown)
            patched.setattr(sys, "stderr", told)
            patched.setattr(sys, "argv", ["zoo", *command.split()])
            with pytest.raises(SystemExit) as ended:
                main()
            for stream in (shown, told):
                stream.flush()
        text = [stream.buffer.getvalue().decode(encoding) for stream in (shown, told)]
        assert (ended.value.code or 0) == code, (command, text)
        assert "Traceback" not in "".join(text)
        assert "".join(text).strip() or "--out" in command, command
        if code == 2:
            assert text[1].startswith("Error: "), (command, text)
    assert "größe × 2" in Path("größe.md").read_text(encoding="utf-8")
    assert Path("größe.png").stat().st_size > 1000


@pytest.mark.parametrize("command", ["map moc --out", "bench --plot", "ladder none --plot", "replay none --plot"])
@pytest.mark.parametrize("name", ["picture", "picture.txt", "folder.png"])
def test_picture_of_no_known_format_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    done = CliRunner().invoke(app, [*command.split(), name])
    assert done.exit_code == 2
    assert f"must be a file whose name ends in .png, .svg, .pdf, got '{name}'" in done.stderr


@pytest.mark.parametrize("path", ["missing/x.md", "folder", "x" * 300, "loop", "file/x.md"])
@pytest.mark.parametrize(
    "command",
    ["report s --markdown --out", "report s --results", "train --config", "sweep", "sample", "replay", "data check"],
)
def test_path_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    write_sweep_of("s", {"a": (0.9, 0.8)}, {"a": {"name": "dense"}})
    Path("folder").mkdir()
    Path("file").write_text("", encoding="utf-8")
    Path("loop").symlink_to("loop")
    done = CliRunner().invoke(app, [*command.split(), path])
    if command.endswith("--results") and path in ("missing/x.md", "loop"):  # the folder is made, the link is replaced
        assert done.exit_code == 0
        return
    assert done.exit_code == 2, done.exception
    assert done.stderr.strip().startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "ZOO_HOME" not in done.stderr  # which has nothing to do with it


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench --out folder", "--out must be a file, got 'folder', which is none"),
        ("bench --out file/x.json", "--out 'file/x.json' lies in '{here}/file', which is no folder"),
        ("bench --plot file/x.png", "--plot 'file/x.png' lies in '{here}/file', which is no folder"),
        ("sample none --out file", "--out must be a folder, got 'file', which is none"),
        ("sample none --plot x.txt", "--plot must be a file whose name ends in .png, .svg, .pdf, got 'x.txt'"),
        ("capture none --out folder", "--out must be a file, got 'folder', which is none"),
        ("compare --model m --prompts p --methods moc --out file", "--out must be a folder, got 'file', which is none"),
    ],
)
def test_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("", encoding="utf-8")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 2, done.exception
    assert said.format(here=tmp_path) in done.stderr


@pytest.mark.parametrize("home", ["x" * 300, "loop", "file"])
def test_home_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("", encoding="utf-8")
    Path("loop").symlink_to("loop")
    monkeypatch.setenv("ZOO_HOME", home)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    config = write_sweep(tmp_path / "s.yaml", cells={"a": {}})
    done = CliRunner().invoke(app, ["sweep", str(config)])
    assert done.exit_code == 2, done.exception
    assert "where $ZOO_HOME says" in done.stderr
    assert "Traceback" not in done.stderr


def test_film_that_no_memory_holds_is_one_line() -> None:
    size = "100000"
    done = CliRunner().invoke(app, ["cost", "moc", "--frames", size, "--rows", size, "--cols", size])
    assert done.exit_code == 2, done.exception
    assert done.stderr.startswith("Error: more memory is needed than there is: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["sweep quickstart --dry-run --jobs 0", "sweep quickstart --jobs -3"])
def test_number_of_jobs_is_refused_before_anything_is_read(command: str) -> None:
    assert CliRunner().invoke(app, command.split()).exit_code == 2


def test_a_malformed_address_is_one_line_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://me:secret@host")
    write_sweep(tmp_path / "s.yaml", cells={"a": {}})
    done = CliRunner().invoke(app, ["sweep", "s.yaml"])
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: MLFLOW_TRACKING_URI: ")
    assert len(done.stderr.splitlines()) == 1
    assert "http://HOST:PORT" in done.stderr
    assert "secret" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_pipe_cuts_no_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table()
    for number in range(40):
        table.add_column(f"column {number}", no_wrap=True)
    table.add_row(*["0.0123456789"] * 40)
    monkeypatch.delenv("COLUMNS", raising=False)
    Screen().print(table)
    wide = capsys.readouterr().out
    assert wide.count("0.0123456789") == 40
    assert "…" not in wide
    monkeypatch.setenv("COLUMNS", "79")
    Screen().print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) == 80


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_terminal_loses_no_column_and_no_advice(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table = CliRunner().invoke(app, ["cost", "moc", "--frames", "2", "--rows", "4", "--cols", "4"]).output
    assert "…" not in table
    for shown in ("  pairs", "  density", "100.00 %", "linear layers", "dense ÷ it"):
        assert shown in table
    told = CliRunner().invoke(app, ["train", "trainer.max_step=3"]).stderr
    assert len(told.splitlines()) == 1  # the terminal breaks it
    assert "did you mean 'max_steps'?" in told
    wrong = CliRunner().invoke(app, ["cost", "moc", "--frames", "many"]).stderr
    assert "a valid integer" in " ".join(re.sub("[│╭╰─╮╯]", " ", wrong).split())
