"""Any method inside a pretrained video transformer: attach, sample, capture, fine-tune, detach.

    bridge = zoo.attach(model, "moc", top_k=5)
    bridge.film(shots=[6, 6, 9])
    video = pipeline(...)
    print(bridge.cost().density)

torch is all that is needed: diffusers' models are recognised by the names of their classes.
"""

from sparse_zoo.bridge import families as _families  # noqa: F401  importing registers them
from sparse_zoo.bridge.bridge import Bridge, attach, bridge_of
from sparse_zoo.bridge.family import Family, family_names, register_family

__all__ = ["Bridge", "Family", "attach", "bridge_of", "family_names", "register_family"]
