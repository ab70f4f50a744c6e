"""Arrays of which Pallas' pointers reach a part alone are refused, so that plain JAX takes them.

Pallas counts places in 64 bits in arrays of more than 2^32 bytes; below that in 32, with a sign.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.append_rows import triton as append_rows
from pallas_kernels.attend_dense import triton as attend_dense
from pallas_kernels.attend_zones import triton as attend_zones
from pallas_kernels.types import Estimate, Picks, Rows, SteadyRows, StoredRows
from tests.support.lowering import lower_for, triton_modules

LAYERS, HEADS, HEAD_DIM = 32, 8, 128
# A row of keys and values is 256 numbers: in all layers 65,536 a token.
REACHED, OUT_OF_REACH, WIDE = 32_768, (32_769, 49_152, 65_536), 65_537


def of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def rows_of(*shape, dtype=jnp.int8):
    scales = of(*shape[:-1], dtype=jnp.float32) if dtype == jnp.int8 else None
    return Rows(of(*shape, dtype=dtype), scales)


def calls(tokens, dtype):
    row, own, i32 = (LAYERS, 1, HEADS), (1, HEADS), jnp.int32
    query, layer, one = of(*own, 4, HEAD_DIM), of(dtype=i32), of(1, dtype=i32)
    ring = of(*row, 64, 2, HEAD_DIM)
    picks = Picks(of(*own, 64, dtype=i32), of(*own, 64, dtype=i32), of(*own, 64, dtype=jnp.bool_))
    estimate = Estimate(
        of(*own, 4, 64, dtype=jnp.float32),
        of(*row, 64, HEAD_DIM),
        of(*row, 65, dtype=i32),
        of(*own, 64, dtype=i32),
    )
    store = rows_of(*row, tokens, 2, HEAD_DIM, dtype=dtype)
    stored = StoredRows(store, rows_of(*row, 0, 2, HEAD_DIM, dtype=dtype))
    # Of keys, and of values, half as many.
    half = rows_of(*row, 2 * tokens, HEAD_DIM, dtype=dtype)
    new = of(HEADS, 64, 2, HEAD_DIM)
    return {
        "attend_zones": (
            functools.partial(attend_zones.attend_zones, scale=0.1),
            (query, SteadyRows(ring, one, ring, one), stored, picks, estimate, layer),
        ),
        "attend_dense": (
            functools.partial(attend_dense.attend_dense, scale=0.1),
            (query, half, half, one, layer),
        ),
        "append_rows": (append_rows.append_rows, (store, new, layer, layer, layer)),
    }


@pytest.mark.parametrize("op", ["attend_zones", "attend_dense", "append_rows"])
def test_what_is_out_of_reach_is_refused(op):
    for tokens in OUT_OF_REACH:
        function, operands = calls(tokens, jnp.int8)[op]
        with pytest.raises(NotImplementedError, match=f"{tokens * 2**16} numbers of one byte"):
            jax.eval_shape(function, *operands)
    # Two bytes a number are counted in 64 bits from the same number of them on.
    for tokens, dtype in ((REACHED, jnp.int8), (WIDE, jnp.int8), (49_152, jnp.bfloat16)):
        function, operands = calls(tokens, dtype)[op]
        jax.eval_shape(function, *operands)


def test_why_pallas_counts_in_32_bits_below_and_in_64_above():
    """Where this fails, JAX has mended it, and `launch.check_addressable` can go."""
    places = {}
    for tokens in (REACHED, WIDE):
        function, operands = calls(tokens, jnp.int8)["attend_dense"]
        [module] = triton_modules(lower_for("cuda", function, *operands))["attend_dense"]
        places[tokens] = set(re.findall(r"tt\.addptr .*<i8>>, tensor<[\dx]*x(i\d\d)>", module))
    assert places == {REACHED: {"i32"}, WIDE: {"i64"}}
