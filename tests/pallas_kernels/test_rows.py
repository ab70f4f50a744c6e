"""`Rows`: the format that they say they have, and that formats are not mixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from tests.support.zone_operands import zone_operands

SHAPE = (2, 1, 3, 5, 2, 64)
PLAIN = ops.Rows(jnp.arange(np.prod(SHAPE), dtype=jnp.bfloat16).reshape(SHAPE))
SCALED = ops.Rows(jnp.ones(SHAPE, jnp.int8), jnp.ones(SHAPE[:5], jnp.float32))


@pytest.mark.parametrize(
    "rows, expected",
    [
        (PLAIN, ("plain", jnp.bfloat16, 128, 256)),
        # A byte a number, and four bytes for each of the two scales.
        (SCALED, ("scaled", jnp.int8, 128, 136)),
    ],
)
def test_rows_say_how_they_are_held(rows, expected):
    assert (rows.format, rows.dtype, rows.width, rows.row_bytes) == expected
    assert rows.shape == SHAPE
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(rows))
    assert rows.row_bytes * np.prod(SHAPE[:4]) == held


def test_rows_go_through_jit_as_their_arrays():
    found = jax.jit(lambda rows: rows._replace(data=rows.data + 1))(SCALED)
    assert isinstance(found, ops.Rows)
    assert found.format == "scaled"
    np.testing.assert_array_equal(found.data, 2)
    assert len(jax.tree.leaves(PLAIN)) == 1


def zones(store, cache):
    row, clusters = SHAPE[:3], 4
    arrays = {
        "query": jnp.ones((*row[1:], 2, 64), jnp.bfloat16),
        "sink": jnp.ones((*row, 1, 2, 64), jnp.bfloat16),
        "sink_tokens": jnp.ones(1, jnp.int32),
        "window": jnp.ones((*row, 8, 2, 64), jnp.bfloat16),
        "window_tokens": jnp.ones(1, jnp.int32),
        "store": PLAIN.data,
        "cache_rows": PLAIN.data,
        "tokens": jnp.zeros((*row[1:], 3), jnp.int32),
        "slots": jnp.zeros((*row[1:], 3), jnp.int32),
        "hit": jnp.zeros((*row[1:], 3), bool),
        "logits": jnp.zeros((*row[1:], 2, clusters)),
        "value_means": jnp.ones((*row, clusters, 64), jnp.bfloat16),
        "offsets": jnp.zeros((*row, clusters + 1), jnp.int32),
        "remaining": jnp.zeros((*row[1:], clusters), jnp.int32),
    }
    query, steady, _, *rest = zone_operands(arrays)
    return (query, steady, ops.StoredRows(store, cache), *rest, 0)


@pytest.mark.parametrize("implementation", ["auto", "xla", "triton"])
@pytest.mark.parametrize("store, cache", [(SCALED, PLAIN), (PLAIN, SCALED)])
def test_attend_zones_refuses_rows_of_two_formats(implementation, store, cache):
    message = f"the store's rows are {store.format}, the row cache's {cache.format}"
    with pytest.raises(NotImplementedError, match=message):
        ops.attend_zones(*zones(store, cache), scale=0.1, implementation=implementation)
