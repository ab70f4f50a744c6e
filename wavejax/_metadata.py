"""Environments without installed metadata: copied, frozen, or unpacked without *.dist-info."""

import importlib
import importlib.metadata


def import_jaxtyping() -> None:
    """Imports jaxtyping, which asks for its own version as it is imported, where there is none.

    All modules annotate with it; nothing else that they import needs metadata.
    """
    version = importlib.metadata.version
    try:
        version("jaxtyping")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: "0" if name == "jaxtyping" else version(name)
    try:
        importlib.import_module("jaxtyping")
    finally:
        importlib.metadata.version = version
