"""Kernels as our own lowering's text, and what NumPy makes of it."""

import jax
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.own_triton import call
from tests.support import evaluated_kernels


def computed(function, *operands, grid=(1,), shape=None, aliases=None):
    """A kernel's only result, by the text that it becomes: `function` of all of each operand."""
    expected = jax.eval_shape(function, *operands) if shape is None else shape

    def kernel(*refs):
        *inputs, output = refs
        output[...] = function(*(ref[...] for ref in inputs))

    return by_text(kernel, expected, *operands, grid=grid, aliases=aliases)


def by_text(kernel, out, *operands, grid=(1,), aliases=None):
    run = evaluated_kernels.pallas_call(
        kernel,
        name="kernel",
        out_shape=out,
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=jax.tree.map(lambda _: pl.no_block_spec, out),
        input_output_aliases=aliases or {},
    )
    return jax.tree.map(np.asarray, run(*operands))


def text_of(kernel, out, *operands, platform="cuda", grid=(1,), name="kernel"):
    trace = call.traced(
        kernel,
        num_warps=4,
        num_stages=2,
        name=name,
        out_shape=out,
        grid=grid,
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
    )
    return trace(*operands)[0].text(platform)
