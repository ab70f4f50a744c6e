"""The TPU's kernel of `score_clusters`, interpreted as on a TPU, and lowered for one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.score_clusters import tpu
from tests.support.cluster_cases import (
    BATCH,
    HEADS,
    LAYERS,
    SCALE,
    check,
    check_nan,
    cluster_case,
)
from tests.support.lowering import lower_for
from tests.support.tpu_interpreter import interpret


@pytest.mark.parametrize(
    "group, head_dim, dtype, block",
    [(3, 64, "float32", 128), (5, 128, "bfloat16", 128), (1, 256, "float32", None)],
)
def test_it_is_the_reference(group, head_dim, dtype, block):
    case = cluster_case(group, group, head_dim, dtype)
    settings = {"scale": SCALE, "rotated": True}
    config = block and tpu.Config(block)
    kernel = functools.partial(tpu.score_clusters, config=config, interpret=True, **settings)
    found = interpret(kernel, *case)
    check(found, case, rotated=True)


def test_nan_in_a_cluster_shows_in_its_row_alone():
    kernel = functools.partial(tpu.score_clusters, scale=SCALE, interpret=True)
    check_nan(functools.partial(interpret, kernel), 64, "float32")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"head_dim": 32}, "head_dim is 32"),
        ({"dtype": "float16"}, "float16; the TPU's kernel knows"),
        ({"room": 0}, "centroids are empty"),
        ({"directions": jnp.zeros(1)}, "no kernel for moments"),
    ],
)
def test_it_says_what_it_does_not_support(change, match):
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", "float32")
    row = (LAYERS, BATCH, HEADS, change.get("room", 8))
    operands = (
        jnp.zeros((BATCH, HEADS, 4, head_dim), dtype),
        jnp.zeros((*row, head_dim), dtype),
        jnp.zeros((*row[:3], row[3] + 1), jnp.int32),
    )
    with pytest.raises(NotImplementedError, match=match):
        tpu.score_clusters(*operands, 0, scale=1.0, directions=change.get("directions"))


@pytest.mark.parametrize("group, head_dim, dtype", [(3, 64, "bfloat16"), (16, 256, "float32")])
def test_it_lowers(group, head_dim, dtype):
    case = jax.eval_shape(lambda: cluster_case(0, group, head_dim, dtype))
    text = lower_for("tpu", functools.partial(tpu.score_clusters, scale=SCALE), *case)
    assert 'kernel_name = "score_clusters"' in text
