"""Where MLflow's store is: $MLFLOW_TRACKING_URI, judged before anything is trained, or a SQLite file among the runs."""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from experiments.redact import redact
from experiments.tracking.store import home
from sparse_zoo.errors import refuse

BUSY = 30  # seconds that a write waits for another process to finish its own, in SQLite
DATABASES = ("postgresql", "mysql", "mssql", "sqlite")
ALLOWED = (
    "http://HOST:PORT, https://HOST, sqlite:///FILE, postgresql://USER@HOST/DATABASE (or mysql, mssql), databricks, "
    "file:///FOLDER, or a folder that begins with / or ./"
)


def tracking_uri() -> str:
    """The address as MLflow takes it; raises `ZooError` for one that it cannot."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not given:
        return sqlite_uri(home() / "mlflow.db")
    wrong = f"{redact(given)!r} is no address of a store; use {ALLOWED}"
    refuse("MLFLOW_TRACKING_URI", [] if _well_formed(given) else [wrong])
    return given


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file, quoted: a path may hold what a URL takes for its query or an escape.

    It names the driver, since MLflow makes a folder of the quoted name where the address begins with "sqlite:///".
    """
    url = URL.create("sqlite+pysqlite", database=str(path.absolute()), query={"timeout": str(BUSY)})
    return url.render_as_string(hide_password=False)


def sqlite_file(uri: str) -> Path | None:
    """The file of such an address, or of a plain sqlite:///FILE; None for any other."""
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):  # no database's
        return None
    plain = url.get_backend_name() == "sqlite" and dict(url.query) in ({}, {"timeout": str(BUSY)})
    return Path(url.database) if plain and url.database not in (None, "", ":memory:") else None


def _well_formed(uri: str) -> bool:
    named = re.match(r"([a-zA-Z][\w.-]*)(\+[\w+.-]*)?:", uri)
    scheme = named[1].lower() if named else ""
    if scheme in ("http", "https"):
        try:
            return bool(urlsplit(uri).hostname) and urlsplit(uri).port != 0
        except ValueError:  # the port is no number, or a bracket of an IPv6 address is missing
            return False
    if scheme in DATABASES:
        try:
            url = make_url(uri)
        except (ArgumentError, ValueError):
            return False
        return bool(url.database if scheme == "sqlite" else url.host)
    if scheme:
        known = {
            "file",
            "databricks",
            "databricks-uc",
            "uc",
            *(x.name for x in entry_points(group="mlflow.tracking_store")),
        }
        return scheme in known
    return uri in ("databricks", "databricks-uc") or uri.startswith(("/", "./", "../")) or Path(uri).is_dir()
