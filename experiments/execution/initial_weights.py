"""The weights of a finished run, laid into a module that is about to train."""

from __future__ import annotations

import re

from experiments.config.init_from import Start
from experiments.execution.checkpointing import load_plain
from lit_modules import LitVideoDiT
from sparse_zoo.errors import ZooError, refuse

OWN = re.compile(r"model\.blocks\.\d+\.attention\.")  # parameters of the method, which may be another one


def load_initial_weights(module: LitVideoDiT, start: Start) -> str:
    """Load the averaged weights of a run, and return a line on which were not there or not needed.

    Methods may differ: what only the new one has stays as it was initialised, what only the old one had is left out.

    Raises:
        ZooError: if the models differ elsewhere, with every difference, or the checkpoint cannot be read.
    """
    try:
        theirs = load_plain(start.checkpoint)["state_dict"]
    except (ValueError, KeyError, OSError) as error:
        raise ZooError(f"init_from: {start.checkpoint} {error}") from error
    ours = module.state_dict()
    kept = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
    new, left_out = ([key for key in some if key not in kept] for some in (ours, theirs))
    refuse(
        f"init_from: {start.folder}",
        [
            f"{key} has the shape {tuple(ours[key].shape)}, there {tuple(theirs[key].shape)}"
            if key in ours and key in theirs
            else f"{key} is missing there"
            if key in ours
            else f"this model has no {key}"
            for key in dict.fromkeys([*new, *left_out])
            if not OWN.match(key)
        ],
    )
    module.load_state_dict(kept, strict=False)
    differ = [f"{len(new)} of the method are new"] * bool(new) + [f"{len(left_out)} are left out"] * bool(left_out)
    parameters = f"; parameters: {', '.join(differ)}" if differ else ""
    return f"begins with the weights of {start.folder.name} after {start.steps} steps{parameters}"
