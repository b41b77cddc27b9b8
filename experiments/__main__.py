"""The `zoo` command; says which extra to install where its packages are missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich", "jinja2", "omegaconf", "lightning", "torchmetrics", "mlflow", "av", "matplotlib")


def main() -> None:
    """Run `zoo`; exit code 2 where the extra `train` is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        needs = "pip install 'sparse-attention-zoo[train]'"
        print(f"Error: zoo: {', '.join(missing)} not installed; needs the extra train: {needs}", file=sys.stderr)
        sys.exit(2)
    from experiments import cli

    cli.main()


if __name__ == "__main__":
    main()
