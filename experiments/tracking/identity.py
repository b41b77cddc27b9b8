"""What a run computes, apart from where and how it is computed: what its id is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Settings that change no number of a result. Paths of data are part of it: they are made absolute when a config is
# read (`experiments.config.datamodule.absolute`), so that one folder has one spelling.
ELSEWHERE = {
    "data": {"cache", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor"},
    "trainer": {"devices", "num_nodes", "log_every_n_steps", "profiler", "enable_autolog_hparams", "model_registry"},
}

# Settings that came later than results that are kept, with the values at which nothing changes: left out there.
NEUTRAL: dict[str, dict[str, Any]] = {
    "data": {
        "poses": 1,
        "scales": 1,
        "screens": 1,
        "distractors": 0,
        "scenery": False,
        "judged": "last",
        "least_subjects": None,
    },
    "flow": {"known": 0.0},
    "optim": {"muon_float32": False},
}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the settings that say where it runs: two runs of one identity compute the same."""
    made = {
        section: {
            key: value
            for key, value in own.items()
            if key not in ELSEWHERE.get(section, ()) and (key, value) not in NEUTRAL.get(section, {}).items()
        }
        if isinstance(own, Mapping) and (section in ELSEWHERE or section in NEUTRAL)
        else own
        for section, own in config.items()
    }
    if "parallel" in made:
        # How many devices share a film changes no number beyond rounding; whether they do decides how it is kept.
        parallel = made["parallel"]
        made["parallel"] = {"data": parallel.get("data", 1), "shards": parallel.get("sequence", 1) > 1}
    return made


def flatten(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return {dotted key: value}, as overrides name them. A list is one value, and so is an empty mapping."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flatten(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found
