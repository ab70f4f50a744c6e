"""The kernel of `score_clusters` with directions of moments, interpreted and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_clusters import triton
from tests.support.cluster_cases import (
    BATCH,
    HEADS,
    IN_USE,
    LAYER,
    LAYERS,
    SCALE,
    cluster_case,
)
from tests.support.kernel_cases import Heads, kernel_cases
from tests.support.lowering import lower_for


def directions_case(seed, group, head_dim, dtype, kind, rank):
    """Clusters, and directions of those in use; all that must not be read is NaN."""
    operands = cluster_case(seed, group, head_dim, dtype)
    rng = np.random.default_rng(seed + 1)
    directions = 40 * rng.normal(size=(*operands[1].shape[:-1], rank, head_dim))
    past = np.asarray(operands[2])[..., :-1] >= np.asarray(operands[2])[..., -1:]
    directions[past] = 99 if kind == "int8" else np.nan
    return operands, jnp.asarray(np.clip(np.round(directions), -127, 127), kind), ~past[LAYER]


@pytest.mark.parametrize(
    "group, head_dim, dtype, kind, rank, rotated",
    [
        (1, 64, "float32", "float32", 1, False),
        (6, 96, "float32", "bfloat16", 2, True),
        (7, 128, "bfloat16", "bfloat16", 4, False),
        (3, 64, "bfloat16", "int8", 4, True),
        (3, 64, "float16", "bfloat16", 2, False),
    ],
)
def test_products_are_those_of_float64(group, head_dim, dtype, kind, rank, rotated):
    operands, directions, in_use = directions_case(group, group, head_dim, dtype, kind, rank)
    score = functools.partial(
        triton.score_clusters, scale=SCALE, rotated=rotated, config=triton.Config(32, 2),
        interpret=True,
    )  # fmt: skip
    found, without = score(*operands, directions=directions), score(*operands)
    assert found.products.shape == (BATCH, HEADS, group, IN_USE[0], rank)
    query, vectors = (np.asarray(x, np.float64) for x in (operands[0], directions[LAYER]))
    expected = SCALE * np.einsum("bhgd,bhcrd->bhgcr", query, np.nan_to_num(vectors))
    error = np.where(in_use[:, :, None, :, None], found.products - expected, 0)
    assert np.abs(error).max() < 1e-6 * np.abs(expected).max()
    # All else is as without directions, to the bit.
    assert without.products is None
    others = jax.tree.leaves(found._replace(products=None)), jax.tree.leaves(without)
    for one, other in zip(*others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("heads", [Heads(7, 128, "bfloat16"), Heads(1, 96, "float32")], ids=str)
def test_it_lowers(platform, heads):
    case = kernel_cases(heads)["score_clusters-moments"]
    text = lower_for(platform, case.function, *case.operands)
    for name in case.kernels:
        assert f'"{name}"' in text
    assert "dynamic_slice" not in text
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize(
    "shape, kind, match",
    [((8, 2, 64), "int16", "directions is int16"), ((2**17, 32, 64), "int8", "of one byte")],
)
def test_it_says_which_directions_it_does_not_read(shape, kind, match):
    row = (LAYERS, BATCH, HEADS, shape[0])
    operands = (
        jax.ShapeDtypeStruct((BATCH, HEADS, 4, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((*row, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((*row[:3], row[3] + 1), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    directions = jax.ShapeDtypeStruct((*row[:3], *shape), kind)
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(
            lambda *a: triton.score_clusters(*a[:-1], scale=1.0, directions=a[-1]),
            *(*operands, directions),
        )
