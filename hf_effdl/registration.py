"""How slim models are registered with transformers: at once where its quantizers are imported, else when they are.

`from_pretrained` reads the registry in `transformers.quantizers`, and imports it for that; importing it with this
package would take longer than all the rest.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


REGISTRY = "transformers.quantizers"
SLIM_CONFIG = "hf_effdl.structure.groups.slim_config"  # registers itself


class _AfterRegistry(MetaPathFinder):
    """Finds the registry as Python does, and has slim models registered once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == REGISTRY else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            forget()
            import_module(SLIM_CONFIG)

        spec.loader.exec_module = execute_and_register
        return spec


def forget() -> None:
    """Stop waiting."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterRegistry)]


def register() -> None:
    """Register now, or as soon as it can matter."""
    if REGISTRY in sys.modules:
        import_module(SLIM_CONFIG)
    else:
        forget()
        sys.meta_path.insert(0, _AfterRegistry())
