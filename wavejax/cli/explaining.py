"""What each op took, as a command tells it, and a wrong choice of it as a line of an error."""

import dataclasses
import os
import sys
from typing import Any

import jax

from models.errors import InputError
from pallas_kernels import explain
from pallas_kernels.dispatch import VARIABLE, requested

HELP = "At the end, say which implementation each op took, and why."


def check_variable() -> None:
    """Raise InputError where the environment variable names no implementation."""
    try:
        requested(None)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_platform() -> None:
    """Raise InputError where kernels are asked for and JAX has no GPU; starts JAX's device."""
    backend = jax.default_backend()
    if requested(None) == "triton" and backend != "gpu":
        raise InputError(
            f"{VARIABLE} is triton, and there are no kernels for {backend}: leave it out, or set "
            "it to xla"
        )


def asked_for_kernels(error: NotImplementedError) -> str | None:
    """Describe a case that kernels do not support, if the variable asks for them; else None."""
    if os.environ.get(VARIABLE) != "triton":
        return None
    return f"{error}; {VARIABLE}=triton allows nothing else: leave it out, or set it to xla"


def print_explanation() -> None:
    """Print what each op took on stderr: a table of one choice a line."""
    told = explain()
    print(told if told else "no op was traced", file=sys.stderr)


def explanation_json() -> list[dict[str, Any]]:
    """Return what each op took, as `--json` prints it."""
    return [dataclasses.asdict(choice) for choice in explain()]
