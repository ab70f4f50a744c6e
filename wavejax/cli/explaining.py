"""What each op took, as a command tells it, and a wrong choice of it as a line of an error."""

import dataclasses
import os
import sys
from typing import Any

import jax

from models.errors import InputError
from pallas_kernels import explain, triton_route
from pallas_kernels.dispatch import VARIABLE, requested

# Implementations that are kernels, and the platform of each as JAX names it.
KERNELS = {"triton": "gpu", "tpu": "tpu", "mosaic_gpu": "gpu"}

HELP = "At the end, say which implementation each op took, and why."


def check_variable() -> None:
    """Raise InputError where an environment variable names no implementation, or no route."""
    try:
        requested(None)
        triton_route.check_route()
    except (ValueError, ModuleNotFoundError) as error:
        raise InputError(str(error)) from error


def check_platform() -> None:
    """Raise InputError where kernels of another platform are asked for; starts JAX's device."""
    backend, asked = jax.default_backend(), requested(None)
    if asked in KERNELS and backend != KERNELS[asked]:
        raise InputError(
            f"{VARIABLE} is {asked}, and there are no such kernels for {backend}: leave it out, or "
            "set it to xla"
        )


def asked_for_kernels(error: NotImplementedError) -> str | None:
    """Describe a case that kernels do not support, if the variable asks for them; else None."""
    asked = os.environ.get(VARIABLE)
    if asked not in KERNELS:
        return None
    return f"{error}; {VARIABLE}={asked} allows nothing else: leave it out, or set it to xla"


def print_explanation() -> None:
    """Print what each op took on stderr: a table of one choice a line."""
    told = explain()
    print(told if told else "no op was traced", file=sys.stderr)


def explanation_json() -> list[dict[str, Any]]:
    """Return what each op took, as `--json` prints it."""
    return [dataclasses.asdict(choice) for choice in explain()]
