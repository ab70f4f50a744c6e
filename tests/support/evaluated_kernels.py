"""Interpreted kernels by way of `own_triton`'s text: Pallas' interpreter is not asked.

As a plugin of pytest, `-p tests.support.evaluated_kernels`, it makes every test of an interpreted
kernel one of the text that our own lowering writes, run by `ttir_evaluator`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.support.ttir_evaluator import evaluate

evaluated: dict[str, int] = {}


def pallas_call(kernel: Callable[..., None], *, name: str, **settings: Any) -> Callable[..., Any]:
    """What `pl.pallas_call` does with interpret=True, by NumPy."""
    from pallas_kernels.own_triton import call

    launch = call.traced(kernel, num_warps=4, num_stages=2, name=name, **settings)

    def run(*operands: Any) -> Any:
        made, avals, tree = launch(*operands)
        text, flat = made.text("cuda"), jax.tree.leaves(operands)

        def on_cpu(*arrays: Any) -> Any:
            inputs = [np.array(x, order="C") for x in arrays]
            # What no program writes shows.
            outputs = [np.full(a.shape, poison(a.dtype), a.dtype) for a in avals]
            for operand, result in made.aliases:
                outputs[result] = inputs[operand]
            evaluate(text, made.launch_grid, [*inputs, *outputs])
            evaluated[name] = evaluated.get(name, 0) + 1
            return outputs

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        return jax.tree.unflatten(tree, jax.pure_callback(on_cpu, shapes, *flat))

    return run


def poison(dtype: Any) -> Any:
    return np.nan if np.issubdtype(np.dtype(dtype), np.floating) or dtype.kind == "V" else 1


def pytest_configure() -> None:
    from pallas_kernels import triton_route

    triton_route.interpreted_call = pallas_call


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"kernels evaluated: {sorted(evaluated.items())}")
