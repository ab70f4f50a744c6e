"""Packages that compile for platforms that are not there: kept out of the tests' environment.

`libtpu` and the CUDA plugin beside JAX make it look for TPUs and GPUs in every process, and
`triton` is large. So `make test-slow` and `make test-all` put them into a folder of their own,
which WAVEJAX_PLATFORM_PACKAGES names.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

VARIABLE = "WAVEJAX_PLATFORM_PACKAGES"


def package_folder(name: str) -> Path | None:
    """The folder from which a package is to be imported; None where it is installed as others are.

    Skips the test where there is none, with the reason.
    """
    folder = os.environ.get(VARIABLE)
    if folder is not None and (Path(folder) / name).is_dir():
        return Path(folder)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"there is no {name} in the folder that {VARIABLE} names: {folder}")
    return None


def import_package(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """Imports a package from its folder, for as long as the patch holds."""
    folder = package_folder(name)
    if folder is not None:
        patch.syspath_prepend(str(folder))
    return importlib.import_module(name)
