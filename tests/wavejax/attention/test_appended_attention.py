"""Appended tokens attend exactly to rows at hand and stored ones: in blocks, and as by cuDNN."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.types import MASKED
from tests.support.appended_cases import ROOM, check_attend
from wavejax.attention import appended_attention
from wavejax.attention.appended_attention import chunks_of, splits_of

COUNTS = [0, 1, 2048, 4321, ROOM]


@pytest.mark.parametrize("stored", COUNTS)
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_by_blocks_it_is_what_float64_gives(stored, dtype, atol):
    check_attend(stored, dtype, 16, seed=stored, atol=atol)


def plain(query, key, value, *, scale, key_value_seq_lengths, implementation, return_residual):
    """What cuDNN computes, its layouts and its mask; a GPU has `tests/gpu` for cuDNN itself."""
    assert implementation == "cudnn"
    assert return_residual
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    logits = scale * jnp.einsum("bthd,bshd->bths", query, key)
    seen = jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None, None, None]
    logits = jnp.where(seen, logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bths,bshd->bthd", weights, value), jax.nn.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("stored", COUNTS)
@pytest.mark.parametrize("most", [ROOM, ROOM // 3])
def test_in_chunks_and_parts_it_is_what_float64_gives(stored, most, monkeypatch):
    monkeypatch.setattr(appended_attention, "_takes_cudnn", lambda query: True)
    monkeypatch.setattr(appended_attention, "MOST_ROWS", most)
    monkeypatch.setattr(appended_attention, "LEAST_ROWS", 300)
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    check_attend(stored, "float32", 16, seed=stored, atol=1e-5)


def test_chunks_are_equal_and_none_is_larger_than_may_be():
    assert chunks_of(0) == 0
    assert [chunks_of(room) for room in (1, 2**17, 2**17 + 2, 2**20 + 1024)] == [1, 1, 2, 16]
    # No chunks of one length: rows are then attended to by blocks.
    assert chunks_of(2**17 + 1) == 0


def test_parts_fill_a_gpu_and_are_not_too_short():
    assert splits_of(32_768 + 1024, 9) == 32
    assert splits_of(122_880, 32) == 8
    assert splits_of(1024, 32) == 1
    assert splits_of(4097, 8) == 1
