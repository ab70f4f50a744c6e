"""Set-up of all tests: shape checks, full matmul precision, and the marker `gpu`."""

import jax
import pytest
from jaxtyping import install_import_hook

# Must come before any of the three packages is imported: annotated functions are then checked at
# every call. Users of the packages do not pay for it.
# Where a float is asked for an int will do, as for mypy.
install_import_hook(
    ["models", "wavejax", "pallas_kernels"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# float32 matmuls are otherwise rounded to fewer bits on some platforms.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first; those marked `gpu` skipped where JAX has no CUDA GPU (asked if any are)."""
    # The longest first: started last, one of them would keep one worker busy alone.
    items.sort(key=_seconds, reverse=True)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs a CUDA GPU; JAX runs on {jax.default_backend()}")
        for item in marked:
            item.add_marker(skip)


def _seconds(item: pytest.Item) -> float:
    """What a slow test says it takes, `slow(170)`: 20 if it does not say, 0 for other tests."""
    marker = item.get_closest_marker("slow")
    return 0 if marker is None else marker.args[0] if marker.args else 20
