"""A secret of the environment is used by a run and stands in nothing that the run writes or shows."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from urllib.parse import quote

import pytest
from test_cli import zoo
from tiny import BASE, write_sweep

from experiments import redact
from experiments.config.names import misspelt
from experiments.config.resolve import load, merge, resolve
from experiments.tracking.store import config_id
from sparse_zoo.errors import ZooError

SECRET, ADDRESS = "s3cret-of-the-data", "s3cret-of-the-server"
PLUGIN = '''
import logging
import warnings

import sparse_zoo as zoo
from datamodules import ShotWorld
from sparse_zoo.methods.dense import Dense


@zoo.register("guarded")
class GuardedAttention(Dense):
    """Dense attention that asks for a token."""

    def __init__(self, *, token: str, **base):
        super().__init__(**base)
        assert token == "s3cret-of-the-data", "the token is not the environment's"
        warnings.warn(f"{token} of a method")
        logging.getLogger("guarded").warning("%s is logged", token)


class Guarded(ShotWorld):
    """Films that ask for a token."""

    def __init__(self, *, token: str, also: str, fails: bool = False, seed: int = 0):
        super().__init__(
            subjects=1, tags=1, grid=[2, 2], patch=[1, 3, 3], frames_per_shot=1, batch_size=1, val_films=1, seed=seed
        )
        assert token == "s3cret-of-the-data", "the token is not the environment's"
        assert also == "Bearer s3cret-of-the-data"
        self.save_hyperparameters()  # which Lightning puts into checkpoints
        self.token, self.fails = token, fails

    def summary(self):
        return super().summary() | {"headers": [self.token]}

    def train_dataloader(self):
        warnings.warn(f"{self.token} is about to expire")
        if self.fails and self.trainer is not None:
            raise ValueError(f"{self.token} has expired")
        return super().train_dataloader()
'''


def test_texts_of_the_environment_stay_expressions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/clips")
    monkeypatch.setenv("STEPS", "7")
    config = load([BASE, {"trainer.max_steps": "${oc.decode:${oc.env:STEPS}}"}])
    assert config["trainer"]["max_steps"] == 7
    films = {"name": "video_films", "folder": ["${oc.env:PLACE}/a", "/b"], "captions": "${data.folder.0}/c.json"}
    config, reasons = merge([{"data": films}])
    assert reasons == []
    assert config["data"]["folder"] == ["${oc.env:PLACE}/a", "/b"]
    assert config["data"]["captions"] == "${data.folder.0}/c.json"  # through another setting
    assert resolve(config)["data"]["folder"] == ["/clips/a", "/b"]
    assert resolve(config)["data"]["captions"] == "/clips/a/c.json"
    before = config_id(config)
    monkeypatch.setenv("PLACE", "/moved")
    assert config_id(merge([{"data": films}])[0]) == before
    monkeypatch.setenv("OPTIMIZER", "muon")  # what decides what is computed is part of the id
    assert merge([{"optim.optimizer": "${oc.env:OPTIMIZER}"}])[0]["optim"]["optimizer"] == "muon"
    monkeypatch.setenv("KIND", "video_films")
    assert merge([{"data.name": "${oc.env:KIND}"}])[0]["data"]["name"] == "video_films"
    assert merge(["data=${oc.env:KIND}"]) == merge(["data=video_films"])
    monkeypatch.setenv("METHOD", "moc")
    assert merge(["attention=${oc.env:METHOD}"]) == merge(["attention=moc"])
    assert not misspelt(["data=${oc.env:KIND}", "attention=${oc.env:METHOD}"], plugins=False)
    monkeypatch.delenv("PLACE")
    with pytest.raises(ZooError, match="PLACE"):
        resolve(config)


def test_secrets_are_in_no_file_and_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("TOKEN", SECRET)
    (tmp_path / "guarded.py").write_text(PLUGIN)
    films = {"name": f"{tmp_path}/guarded.py:Guarded", "token": "${oc.env:TOKEN}", "also": "Bearer ${data.token}"}
    axes = {"data.fails": [False, True]}
    base = {**BASE, "data": films, "attention": {"name": "guarded", "token": "${oc.env:TOKEN}"}}
    file = write_sweep(tmp_path / "secret.yaml", base=base, axes=axes, plugins=["guarded.py"])
    shown = [zoo("sweep", file), zoo("report", "secret", "--json"), zoo("report", "secret", "--runs")]
    assert [result.exit_code for result in shown] == [1, 0, 0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{ADDRESS}@127.0.0.1:9")
    shown += [zoo("sweep", file), zoo("sweep", file, "--dry-run")]
    assert "***@127.0.0.1" in shown[-2].output
    assert "${oc.env:TOKEN} is logged" in caplog.text
    checkpoint = next((tmp_path / "runs" / "secret").glob("*/checkpoints/*.ckpt"))
    shown.append(zoo("sample", str(checkpoint), "--films", "1", "--plugin", str(tmp_path / "guarded.py")))
    assert shown[-1].exit_code == 0, shown[-1].output
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "secret").glob("*/result.json")]
    assert {result["status"] for result in results} == {"finished", "failed"}
    assert [result["config"]["data"]["token"] for result in results] == ["${oc.env:TOKEN}"] * 2
    assert [result["config"]["attention"]["token"] for result in results] == ["${oc.env:TOKEN}"] * 2
    assert "ValueError: ${oc.env:TOKEN} has expired" in {result["reason"] for result in results}
    assert [result["data"]["headers"] for result in results] == [["${oc.env:TOKEN}"]] * 2
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    del written[str(tmp_path / "guarded.py")]
    for kind in ("mlflow.db", ".ckpt", "warnings.txt", "config.json", "report.html"):
        assert any(kind in name for name in written), kind
    told = written | {f"command {number}": result.output.encode() for number, result in enumerate(shown)}
    for secret in (SECRET, ADDRESS):
        assert [name for name, text in told.items() if secret.encode() in text] == []
        assert secret not in caplog.text


def test_warnings_and_log_records_of_plugins_are_redacted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redact, "_hidden", {})
    redact.hide(SECRET, "${oc.env:TOKEN}")
    with redact.redacted_messages():
        shown = warnings.formatwarning(UserWarning(f"{SECRET} expires"), UserWarning, "plugin.py", 3, "warn()")
        logging.getLogger("plugin").warning("%s expires on %s", SECRET, "Monday")
    assert "UserWarning: ${oc.env:TOKEN} expires" in shown
    assert [record.getMessage() for record in caplog.records] == ["${oc.env:TOKEN} expires on Monday"]
    assert SECRET in warnings.formatwarning(UserWarning(SECRET), UserWarning, "plugin.py", 3)


def test_refusals_show_the_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    result = zoo("train", "optim.optimizer=${oc.env:TOKEN}")
    assert result.exit_code == 2
    assert "got '${oc.env:TOKEN}'" in result.output
    assert SECRET not in result.output


def test_secret_is_hidden_however_it_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_hidden", {})
    secret = "pä\\ss/\"w'ord"
    redact.hide(secret, "<hidden>")
    for shown in (secret, repr(secret), json.dumps(secret), quote(secret), quote(secret, safe=""), repr([secret])):
        assert "ord" not in redact.redact(f"open {shown} failed"), shown
