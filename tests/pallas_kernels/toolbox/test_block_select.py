"""Where a selection ends, in plain JAX; `tests/gpu/test_search_on_gpu.py` has the assembly."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.toolbox import ptx_histogram
from pallas_kernels.toolbox.block_select import last_key

elements = st.lists(
    st.tuples(st.sampled_from([0, 1, 5, 2**20, 2**31, 2**32 - 2]), st.integers(0, 9)),
    min_size=8,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(elements, st.integers(1, 40), st.booleans())
def test_last_key_is_where_the_sorted_keys_reach_the_budget(drawn, budget, weighted):
    keys = np.array([key for key, _ in drawn], np.uint32)
    weights = np.where(keys > 0, [x for _, x in drawn] if weighted else 1, 0).astype(np.int32)
    end = last_key(
        list(jnp.asarray(keys).reshape(2, 4)),
        list(jnp.asarray(weights).reshape(2, 4)) if weighted else None,
        jnp.int32(budget),
        interpret=True,
    )
    distinct = np.unique(keys[keys > 0])[::-1]
    held = [weights[keys >= key].sum() for key in distinct]
    reached = [key for key, x in zip(distinct, held, strict=True) if x >= budget]
    expected = reached[0] if reached else distinct[-1] if len(distinct) else 0
    np.testing.assert_array_equal(end.key, np.full(4, expected, np.uint32))
    if expected:
        np.testing.assert_array_equal(end.above, np.full(4, weights[keys > expected].sum()))
        np.testing.assert_array_equal(end.ties, np.full(4, (keys == expected).sum()))


@pytest.mark.parametrize("fine", [0, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_assembly_has_what_it_uses(fine, weighted):
    text = ptx_histogram.search(3, weighted, 128, fine)
    # Operands: the result, three keys, the budget, and weights where there are any.
    named = {int(x) for x in re.findall(r"\$(\d+)", text)}
    assert named == set(range(8 if weighted else 5))
    labels = [line[:-1] for line in text.splitlines() if line.endswith(":")]
    assert len(labels) == len(set(labels))
    for line in text.splitlines():
        if "bra" in line.split()[:2] or "bra.uni" in line.split()[:2]:
            assert line.split()[-1].rstrip(";") in labels
