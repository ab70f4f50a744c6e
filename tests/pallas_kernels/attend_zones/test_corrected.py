"""The kernel of the estimate by moments, interpreted, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attend_zones import reference
from pallas_kernels.attend_zones import triton as kernel
from pallas_kernels.types import MASKED, NO_ID, Spread
from tests.pallas_kernels.attend_zones.test_kernel import (
    QUICKLY,
    TILES,
    TOLERANCES,
    assert_close,
    merge,
)
from tests.support.kernel_cases import Heads, kernel_cases
from tests.support.lowering import lower_for
from tests.support.rest_cases import BATCH, CLUSTERS, HEADS, LAYER, in_levels, rest_case
from tests.support.zone_operands import zone_operands

SPLIT = kernel.Config(2, 2, 3, 1, **TILES)
# More than one tile, program and share of heads; the counts do not divide.
REST = kernel.RestConfig(2, remains_tile=16, heads=4, cluster_tile=4, ahead=2)


@functools.partial(jax.jit, static_argnames="rest", **QUICKLY)
def run_kernel(case, rest=REST):
    config = dataclasses.replace(SPLIT, rest=rest)
    operands = zone_operands(case)
    return kernel.attend_zones(*operands, LAYER, scale=0.2, config=config, interpret=True)


@functools.partial(jax.jit, **QUICKLY)
def run_reference(case):
    return reference.attend_zones(*zone_operands(case), jnp.int32(LAYER), scale=0.2)


def check(found, expected, tolerance):
    """The estimate alone, the other zones together, and the rows admitted."""
    estimated = np.asarray(found.estimated)
    outputs, logsumexps = np.asarray(found.outputs), np.asarray(found.logsumexps)
    assert np.isfinite(logsumexps).all()
    for parts, zones in ((estimated, [2]), (~estimated, [0, 1])):
        best = merge(np.asarray(expected.outputs)[zones], np.asarray(expected.logsumexps)[zones])
        assert_close(merge(outputs[parts], logsumexps[parts]), best, tolerance)
    for one, other in zip(
        *map(jax.tree.leaves, (found.cache_rows, expected.cache_rows)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(
    "group, head_dim, dtype, moments, rank, cached, levels",
    [
        (3, 64, "float32", "float32", 1, True, False),
        (6, 96, "float32", "int8", 4, False, False),
        (7, 128, "bfloat16", "bfloat16", 2, True, False),
        (6, 64, "bfloat16", "int8", 4, True, True),
        (1, 64, "float32", "bfloat16", 2, False, True),
        (3, 64, "float16", "bfloat16", 1, False, False),
    ],
)
def test_it_is_the_reference(group, head_dim, dtype, moments, rank, cached, levels):
    kinds = {"rank": rank, "dtype": dtype, "moments": moments, "cached": cached}
    case = rest_case(group * head_dim, group, head_dim, **kinds)
    if levels:
        case = in_levels(case)
    found, expected = run_kernel(case), run_reference(case)
    # The last sequence has no clusters, all others an estimate.
    assert (np.asarray(found.logsumexps)[found.estimated][:, -1] <= MASKED / 2).all()
    assert (np.asarray(expected.logsumexps)[2, :-1] > MASKED / 2).all()
    check(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    "config",
    [
        kernel.RestConfig(1, remains_tile=128, heads=1, cluster_tile=16, ahead=1),
        kernel.rest_heuristic(BATCH * HEADS, 3, 64, CLUSTERS),
    ],
)
def test_tiles_change_nothing_but_rounding(config):
    case = rest_case(0, 3, 64, rank=4)
    check(run_kernel(case, config), run_reference(case), TOLERANCES["float32"])


@pytest.mark.parametrize("times", [10, 40, 80])
def test_logits_of_tiles_that_are_far_apart(times):
    """Tiles' greatest masses differ by more than float32's whole range."""
    case = rest_case(0, 3, 64, rank=2)
    case |= {"query": times * case["query"], "logits": times * case["logits"]}
    correction = case["correction"]
    case["correction"] = correction._replace(products=times * correction.products)
    found = run_kernel(case)
    assert not np.isnan(np.asarray(found.outputs)).any()
    # A logsumexp of 300 has six digits after the point.
    check(found, run_reference(case), times * TOLERANCES["float32"])


def test_what_is_retrieved_of_clusters_that_are_left_out():
    """A program's clusters may all be left out, while it has rows of theirs."""
    case = rest_case(0, 3, 64, rank=2, cached=False)
    case["remaining"] = case["remaining"].at[..., 8:24].set(0)
    found = run_kernel(case, kernel.RestConfig(5, remains_tile=8, cluster_tile=4, ahead=2))
    assert not np.isnan(np.asarray(found.outputs)).any()
    check(found, run_reference(case), TOLERANCES["float32"])


def test_tiles_that_do_not_fill_a_program_are_refused():
    with pytest.raises(ValueError, match="remains_tile is 16"):
        kernel.RestConfig(2, remains_tile=16, cluster_tile=8, ahead=4)


def test_more_directions_than_are_written_out():
    case = rest_case(4, 3, 64, rank=6)
    check(run_kernel(case), run_reference(case), TOLERANCES["float32"])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_with_nothing_or_all_retrieved(share):
    case = rest_case(1, 3, 64, cached=False, share=share)
    found, expected = run_kernel(case), run_reference(case)
    check(found, expected, TOLERANCES["float32"])
    assert (np.asarray(found.logsumexps)[found.estimated] <= MASKED / 2).all() == (share == 1)


def test_it_gives_the_same_bits_again():
    case = rest_case(2, 7, 64, dtype="bfloat16", moments="int8")
    for one, other in zip(run_kernel(case)[:2], run_kernel(case)[:2], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("where", ["retrieved", "mean", "moment", "product"])
def test_a_number_that_is_not_finite_shows_in_its_head_alone(where):
    case = rest_case(3, 3, 64, cached=False)
    sound = run_kernel(case)
    at, correction = (LAYER, 0, 1), case["correction"]
    [used, *_] = np.flatnonzero(~np.isnan(case["value_means"][at][:, 0]))
    if where == "retrieved":
        [token, *_] = case["tokens"][0, 1][case["tokens"][0, 1] != NO_ID]
        case["store"] = case["store"].at[*at, token, 0, 5].set(jnp.nan)
    elif where == "mean":
        case["value_means"] = case["value_means"].at[*at, used, 5].set(jnp.nan)
    elif where == "moment":
        weights = correction.moments.weights.at[*at, used, 1, 5].set(jnp.nan)
        moments = correction.moments._replace(weights=weights)
        case["correction"] = correction._replace(moments=moments)
    else:
        products = correction.products.at[0, 1, :, used, 0].set(jnp.nan)
        case["correction"] = correction._replace(products=products)
    spoilt = run_kernel(case)
    output, _ = merge(spoilt.outputs, spoilt.logsumexps)
    assert np.isnan(output[0, 1]).any(axis=-1).all()
    for b, h in np.ndindex(BATCH, HEADS):
        if (b, h) != (0, 1):
            for one, other in zip(spoilt[:2], sound[:2], strict=True):
                np.testing.assert_array_equal(one[:, b, h], other[:, b, h])


def test_it_says_what_it_does_not_support():
    case = rest_case(4, 3, 64)
    correction, numbers = case["correction"], jnp.zeros((2, BATCH, HEADS, CLUSTERS))
    wide = jax.ShapeDtypeStruct((2, BATCH, HEADS, CLUSTERS, 2**16, 100), jnp.int8)
    for changed, match in (
        (correction._replace(spread=Spread(numbers, numbers, numbers)), "no kernel for bounds"),
        (
            correction._replace(moments=correction.moments._replace(weights=wide)),
            "attend_corrected: an array has .* numbers of one byte",
        ),
    ):
        with pytest.raises(NotImplementedError, match=match):
            jax.eval_shape(
                functools.partial(kernel.attend_zones, scale=1.0),
                *(*zone_operands(case | {"correction": changed}), 0),
            )


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("name", ["moments", "moments-levels", "moments-host"])
def test_it_lowers(platform, name):
    case = kernel_cases(Heads(7, 128, "bfloat16"))[f"attend_zones-{name}"]
    text = lower_for(platform, case.function, *case.operands)
    for kernel_name in case.kernels:
        assert f'"{kernel_name}"' in text
    # Nothing but the kernels touches what is large, and what is written in place is not copied.
    assert "gather" not in text
    assert "dynamic_slice" not in text
    assert "concatenate" not in text
