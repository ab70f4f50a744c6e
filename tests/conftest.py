"""Set-up of all tests: shape checks, matmul precision, quick compilation, the markers."""

import collections
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Commands keep compiled programs in the user's cache folder, which tests should not fill; nor
# should a test run what another left there. Must come before JAX is imported.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest
from jaxtyping import install_import_hook

from tests.support.quick_compilation import compile_quickly  # imports nothing of the three packages

# Must come before any of the three packages is imported: annotated functions are then checked at
# every call. Users of the packages do not pay for it.
# Where a float is asked for an int will do, as for mypy.
install_import_hook(
    ["models", "wavejax", "pallas_kernels"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# Tracing makes millions of objects that live on: looking through them for garbage every few hundred
# of them takes some 4 % of the tests' time.
gc.set_threshold(200_000, 100, 1000)

# float32 matmuls are otherwise rounded to fewer bits on some platforms.
jax.config.update("jax_default_matmul_precision", "highest")


# Linux gives a process 65,530 memory maps. Each compiled program takes some, and XLA ends the
# process where there are no more.
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """After a module, drops all compiled programs if they have come to take many memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> None:
    """Less than half the time to compile on CPUs: no machine-code optimisation, older emitters.

    Two thirds of the tests' time is compilation. (A compilation cache on disk does not pay: it
    serves one program in twelve.) Not for modules marked `optimised`, which look at compiled
    programs or run longer than they compile, nor on GPUs: there it is compiled as for users.
    """
    if jax.default_backend() == "cpu":
        compile_quickly(request.node.get_closest_marker("optimised") is None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first; those marked `gpu` skipped where JAX has no CUDA GPU (asked if any are)."""
    # The longest first, then the files of most tests: started last, one of them would keep one
    # worker busy alone. xdist keeps this order with --no-loadscope-reorder (Makefile).
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (_seconds(item), tests[item.path]), reverse=True)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason=f"needs a CUDA GPU; JAX runs on {jax.default_backend()}")
        for item in marked:
            item.add_marker(skip)


def _seconds(item: pytest.Item) -> float:
    """What a slow test says it takes, `slow(170)`: 20 if it does not say, 0 for other tests."""
    marker = item.get_closest_marker("slow")
    return 0 if marker is None else marker.args[0] if marker.args else 20
