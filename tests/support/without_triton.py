"""JAX as it will be without its Triton backend: importing this makes the backend unimportable.

As a plugin of pytest, `-p tests.support.without_triton`, it does so before anything else is
imported.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

GONE = ("jax._src.pallas.triton", "jax.experimental.pallas.triton")


class _Refusal(MetaPathFinder):
    """Refuses to find the backend's modules, as if their files were not there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if any(name == module or name.startswith(f"{module}.") for module in GONE):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


early = [module for module in GONE if module in sys.modules]
if early:
    raise RuntimeError(f"too late: {', '.join(early)} is imported already")
sys.meta_path.insert(0, _Refusal())
