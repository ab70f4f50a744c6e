"""The kernels of moments on a CUDA GPU against plain JAX in float32, on random inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.rounding import dequantise
from pallas_kernels.testing.moments import make_correction
from pallas_kernels.types import Rows, StoredRows
from tests.support.gpu_cases import (
    CASES,
    LAYER,
    SEED,
    arguments,
    assert_close,
    inputs_of,
    references_of,
    run_twice,
    upcast,
)
from tests.support.rest_cases import in_levels, rest_case
from tests.support.zone_operands import zone_operands

pytestmark = pytest.mark.gpu

KERNEL = "triton"
FLOATS = (jnp.bfloat16, jnp.float16)
# A million tokens' moments in float32 are much for a test.
of_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape.tokens < 500_000], ids=str
)
of_moments = pytest.mark.parametrize("rank, kind", [(1, "bfloat16"), (2, "float32"), (4, "int8")])


def correction_of(case, rank, kind):
    x, scale = inputs_of(case), case.shape.scale
    return make_correction(x, SEED, rank=rank, dtype=kind, scale=scale, layer=LAYER)


def merged(zones, which):
    """The state of the estimate's parts, or of the others."""
    parts = np.asarray(zones.estimated) == which
    given = jnp.asarray(zones.outputs)[parts], jnp.asarray(zones.logsumexps)[parts]
    return ops.merge_states(*given, implementation="xla")


def compare(found, expected, dtype):
    for which, name in ((True, "estimate"), (False, "other zones")):
        for kind, one, best in zip(
            ("output", "logsumexp"), merged(found, which), merged(expected, which), strict=True
        ):
            assert_close(one, best, dtype, f"{name}, {kind}")


@of_cases
@of_moments
def test_score_clusters(case, rank, kind):
    x, scale = inputs_of(case), case.shape.scale
    directions = correction_of(case, rank, kind).moments.directions

    def score(*operands):
        *operands, directions = operands
        keywords = {"scale": scale, "rotated": True, "directions": directions}
        return ops.score_clusters(*operands, **keywords, implementation=KERNEL)

    operands = x.query, x.centroids, x.offsets, jnp.int32(LAYER)
    found = run_twice(score, *operands, directions)
    query, vectors = (np.asarray(y, np.float64) for y in (x.query, directions[LAYER]))
    expected = scale * np.einsum("bhgd,bhcrd->bhgcr", query, vectors)
    in_use = np.asarray(x.offsets[LAYER])
    in_use = (in_use[..., :-1] < in_use[..., -1:])[:, :, None, :, None]
    products = np.where(in_use, found.products, 0)
    assert_close(products, np.where(in_use, expected, 0), case.shape.dtype, "products")
    logits = references_of(case)["score_clusters"].logits
    assert_close(found.logits, logits, case.shape.dtype, "logits")


@of_cases
@of_moments
def test_attend_zones(case, rank, kind):
    x, keywords = inputs_of(case), {"scale": case.shape.scale}
    correction = correction_of(case, rank, kind)

    def attend(implementation):
        def run(operands, correction):
            *others, estimate, layer = operands
            estimate = estimate._replace(correction=correction)
            zones = ops.attend_zones(
                *others, estimate, layer, **keywords, implementation=implementation
            )
            return zones._replace(cache_rows=zones.cache_rows.data[LAYER])

        return run

    given, plain = (
        arguments("attend_zones", case, inputs, references_of(case))[0] for inputs in (x, upcast(x))
    )
    found = run_twice(attend(KERNEL), given, correction)
    widened = jax.tree.map(lambda y: y.astype(jnp.float32) if y.dtype in FLOATS else y, correction)
    expected = jax.jit(attend("xla"))(plain, widened)
    compare(found, expected, case.shape.dtype)
    np.testing.assert_array_equal(
        found.cache_rows.astype(np.float32), np.asarray(expected.cache_rows)
    )


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("group, head_dim, dtype", [(6, 64, "bfloat16"), (3, 128, "float32")])
def test_clusters_that_lose_members(group, head_dim, dtype, levels, store):
    """Of which all, all but one, or none is retrieved; hits, misses, and misses without a slot."""
    case = rest_case(SEED, group, head_dim, rank=4, dtype=dtype, moments="int8")
    plain = {
        name: y.astype(jnp.float32) if getattr(y, "dtype", None) in FLOATS else y
        for name, y in case.items()
    }
    if levels:
        case, rows = in_levels(case), in_levels(plain)
        for name in ("store", "cache"):
            data = "cache_rows" if name == "cache" else name
            plain[data] = dequantise(Rows(rows[data], rows[f"{name}_scales"]))
    operands = zone_operands(case)
    if store == "host":
        rows = operands[2]
        host = jax.device_put(rows.store.data, jax.memory.Space.Host)
        stored = StoredRows(Rows(host, rows.store.scales), rows.cache)
        operands = (*operands[:2], stored, *operands[3:])

    def attend(implementation):
        return functools.partial(ops.attend_zones, scale=0.2, implementation=implementation)

    found = run_twice(attend(KERNEL), *operands, jnp.int32(LAYER))
    expected = jax.jit(attend("xla"))(*zone_operands(plain), jnp.int32(LAYER))
    compare(found, expected, dtype)
