"""Films to train on: real ones with their real cuts, as pixels or latents, and synthetic ones of known truth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public classes when the first is used, so that `datamodules.settings` is imported without torch."""
    api = import_module(f"{__name__}._api")  # a `from` import would ask this function for `_api`
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)
