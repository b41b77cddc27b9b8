"""A video diffusion transformer on registered attention, its training and its sampling, for Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public classes when the first is used, so that `lit_modules.settings` is imported without torch."""
    api = import_module(f"{__name__}._api")  # a `from` import would ask this function for `_api`
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)
