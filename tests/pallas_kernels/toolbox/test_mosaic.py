"""What the TPU's kernels share; and that the interpreter sees what they may do wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.toolbox import mosaic
from tests.support.tpu_interpreter import interpret, races_found


def double(x, *, waits_first=True):
    """Twice x, which the kernel copies to its own memory itself."""

    def kernel(x_ref, y_ref, copied_ref, copies_ref):
        copy = backend.async_copy(x_ref, copied_ref, copies_ref.at[0])
        copy.start()
        if waits_first:
            copy.wait()
        y_ref[...] = 2 * copied_ref[...]
        if not waits_first:
            copy.wait()

    return backend.tpu_call(
        kernel,
        scalars=0,
        scratch=(backend.vector_memory(x.shape, x.dtype), backend.copy_semaphores((1,))),
        interpret=True,
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(x.shape, lambda *_: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x)


def test_a_copy_that_is_waited_for_is_no_race():
    x = jnp.arange(1024.0).reshape(8, 128)
    np.testing.assert_array_equal(interpret(double, x), 2 * x)


def test_a_copy_that_is_not_waited_for_is_a_race():
    x = jnp.ones((8, 128))
    with pytest.raises(AssertionError, match="touch the same memory"):
        interpret(lambda x: double(x, waits_first=False), x)
    assert races_found()


def test_where_marks_end_and_which_block_is_the_last():
    marks = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(mosaic.end_of(marks), [4, 0, 5])
    np.testing.assert_array_equal(mosaic.end_of(marks[:, :0]), [0, 0, 0])
    ends = jnp.array([0, 1, 4, 5, 8])
    np.testing.assert_array_equal(mosaic.last_block(ends, 4), [0, 0, 0, 1, 1])


def test_places_are_those_of_the_whole():
    assert mosaic.places(2, 128).shape == (1, 128)
    np.testing.assert_array_equal(mosaic.places(2, 3, axis=0), [[6], [7], [8]])
