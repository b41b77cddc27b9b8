import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_zoo as zoo
from experiments.execution.scheduler import loaded_plugins
from sparse_zoo import registry

EXAMPLE = '''
import sparse_zoo as zoo

@zoo.register("{name}")
class OwnAndPreviousShots(zoo.Attention):
    """Every token attends to its own shot and to the `reach` shots before it.

    Args:
        reach: How many shots back.
    """

    def __init__(self, *, reach: int = 1, **base):
        super().__init__(**base)
        self.reach = reach

    def plan(self, q, k, layout):
        s = layout.chunks("shot", captions="inside")
        gap = s.shot[:, None] - s.shot
        return zoo.Plan.blocks(s, s, (s.sample[:, None] == s.sample) & (gap >= 0) & (gap <= self.reach))
'''


def test_every_method_has_settings_and_docs() -> None:
    assert {"dense", "moc", "moc_fixed", "moga", "window"} <= set(zoo.names())
    for name in zoo.names():
        assert zoo.summary(name)
        for setting in zoo.settings(name).values():
            assert setting.doc, (name, setting)
    settings = zoo.settings("moc")
    assert (settings["top_k"].default, settings["causal"].default) == (5, "routing")
    assert next(iter(settings)) == "top_k"
    assert "chunk" not in zoo.settings("moc_fixed")


def test_one_class_in_a_file_is_a_method(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE.format(name="mine"))
    assert zoo.load_plugin(file) == ["mine"]
    assert zoo.load_plugin(file) == ["mine"]
    assert zoo.settings("mine")["reach"].doc == "How many shots back."
    film = zoo.Layout.film([zoo.Shot(1, 2, 2, 1) for _ in range(3)], caption=1)
    attention = zoo.build("mine", heads=1, head_dim=4, reach=2)
    q = torch.randn(1, 1, len(film), 4)
    gap = film.shot[:, None] - film.shot
    assert torch.equal(attention.plan(q, q, film).dense_mask()[0, 0], (gap >= 0) & (gap <= 2))


@pytest.mark.slow
def test_files_of_one_name_are_two_plugins_in_every_process(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "m.py" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(EXAMPLE.format(name=f"of_{path.parent.name}"))
    (tmp_path / "link.py").symlink_to(paths[0])
    assert [zoo.load_plugin(path) for path in paths] == [["of_a"], ["of_b"]]
    assert zoo.load_plugin(tmp_path / "link.py") == ["of_a"]  # one file is loaded once
    assert zoo.load_plugin(tmp_path / "b" / ".." / "a" / "m.py") == ["of_a"]
    classes = [zoo.get(name) for name in ("of_a", "of_b")]
    assert [pickle.loads(pickle.dumps(cls)) for cls in classes] == classes
    assert {*loaded_plugins()} >= {*paths}  # what workers, jobs and tasks are given
    # Another process finds each class under the same name, whatever it loads first.
    code = "import pickle, sys, sparse_zoo as zoo; [zoo.load_plugin(path) for path in sys.argv[1:]];"
    code += "print([cls.__module__ for cls in pickle.load(sys.stdin.buffer)])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, reversed(paths))],
        input=pickle.dumps(classes), capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode().strip() == str([cls.__module__ for cls in classes])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_the_kind", "does not import: ModuleNotFoundError"),
        ("raise SystemExit", "does not import: SystemExit"),
        ("import sys\nsys.exit('no licence')", "does not import: SystemExit: no licence"),
        ("x = 1", "it registers no method"),
        (EXAMPLE.format(name="moc"), "the name is taken by sparse_zoo.methods.moc.MoC"),
        (EXAMPLE.format(name="Mine"), "lower-case letters"),
        (
            "import sparse_zoo as zoo\n@zoo.register('thing')\nclass Thing: pass",
            "is not a subclass of sparse_zoo.Attention",
        ),
    ],
)
def test_bad_plugins_get_one_clear_error_and_leave_nothing(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    before = zoo.names()
    with pytest.raises(zoo.ZooError) as error:
        zoo.load_plugin(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)
    assert zoo.names() == before


def test_a_missing_plugin_is_named(tmp_path: Path) -> None:
    with pytest.raises(zoo.ZooError, match="no such file"):
        zoo.load_plugin(tmp_path / "none.py")


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    with pytest.raises(zoo.ZooError, match=r"unknown method 'mocc'; did you mean 'moc'.*dense, .*moc, moc_fixed"):
        zoo.build("mocc", heads=1, head_dim=4)
    with pytest.raises(zoo.ZooError) as error:
        zoo.build("moc", heads=1, head_dim=4, topk=1, anchor=())
    assert "did you mean 'top_k'" in str(error.value)
    assert "did you mean 'anchors'" in str(error.value)


def test_entry_points_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "somewhere:Method"
        loads = 0

        def load(self) -> None:
            self.loads += 1
            zoo.register("from_an_entry_point")(type("FromEntry", (zoo.Attention,), {"__doc__": "One."}))

    entry = Entry()
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "sparse_zoo.methods" else [])
    monkeypatch.setattr(registry, "_loaded_entry_points", set())
    assert "from_an_entry_point" in zoo.names()
    assert "from_an_entry_point" in zoo.names()
    assert entry.loads == 1


def test_method_without_declarations_is_reported() -> None:
    class Silent(zoo.Attention):
        pass

    film = zoo.Layout.film([zoo.Shot(1, 2, 2)])
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="Silent must define plan"):
        Silent(heads=1, head_dim=4)(q, q, q, film)
