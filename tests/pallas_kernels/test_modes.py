"""Ops in a program that has set 64-bit types and strict modes give what they give in others."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels import dispatch
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.lowering import lower_for, triton_kernels


@contextlib.contextmanager
def strict():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


@pytest.mark.parametrize(
    "platform, names", [("cuda", None), ("rocm", ["select_clusters-few", "attend_dense"])]
)
def test_kernels_are_lowered_in_them(platform, names):
    cases = kernel_cases(ALL_HEADS[0])
    for name in names or cases:
        case = cases[name]
        call = functools.partial(dispatch.call, name, "triton", {"triton": case.function})
        with strict():
            text = lower_for(platform, call, *case.operands)
        assert {kernel.name for kernel in triton_kernels(text)} >= case.kernels, name


def full_attention():
    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((3, 2, 2, 8), (1, 3, 2, 40, 8), (1, 3, 2, 40, 8))
    )
    lengths = jnp.asarray(np.array([0, 7, 40]))
    found = ops.attend_dense(
        jnp.asarray(query), ops.Rows(jnp.asarray(keys)), ops.Rows(jnp.asarray(values)), lengths, 0,
        scale=0.5,
    )  # fmt: skip
    return lengths.dtype, found


def test_whole_numbers_of_64_bits_are_taken_as_those_of_32():
    dtype, expected = full_attention()
    with strict():
        wide, found = full_attention()
    assert (dtype, wide) == (jnp.int32, jnp.int64)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)


def test_floats_of_64_bits_are_computed_in_them():
    with jax.enable_x64(True):
        outputs = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 1, 1, 4)))
        logsumexps = jnp.asarray([0.0, 1.0]).reshape(2, 1, 1, 1)
        seen = []
        plain = {"xla": lambda *x: seen.append((x[0].dtype, jax.config.jax_enable_x64))}
        dispatch.call("an_op", "xla", plain, outputs, logsumexps)
        dispatch.call("an_op", "xla", plain, outputs.astype(jnp.float32), jnp.arange(3))
    assert seen == [(jnp.float64, True), (jnp.float32, False)]
