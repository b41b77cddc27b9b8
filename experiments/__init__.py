"""Experiments on `sparse_zoo`; what needs no tensor is imported without torch, which takes seconds."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def _import_errors() -> None:
    """Import `sparse_zoo.errors` without its package, which imports torch: refusals of names need nothing else of it.

    A later `import sparse_zoo` finds this very module, so there is one `ZooError`.
    """
    name, package = "sparse_zoo.errors", find_spec("sparse_zoo")
    if name in sys.modules or package is None or package.origin is None:
        return
    spec = spec_from_file_location(name, Path(package.origin).with_name("errors.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_import_errors()
