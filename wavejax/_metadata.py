"""Environments without installed metadata: copied, frozen, or unpacked without *.dist-info."""

import importlib
import importlib.metadata

_version = importlib.metadata.version


def import_jaxtyping() -> None:
    """Import jaxtyping, which asks for its own version as it is imported, where there is none.

    All modules annotate with it; nothing else that they import needs metadata.
    """
    try:
        _version("jaxtyping")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = _zero_for_jaxtyping
    try:
        importlib.import_module("jaxtyping")
    finally:
        importlib.metadata.version = _version


def _zero_for_jaxtyping(distribution_name: str) -> str:
    return "0" if distribution_name == "jaxtyping" else _version(distribution_name)
