"""Causal attention in blocks and sections against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavejax import causal_attention as module
from wavejax.causal_attention import QUERY_BLOCK, SMALLEST_BLOCK, causal_attention, query_block


def plain(query, key, value, scale):
    """Softmax over all tokens up to each one, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    logits = scale * np.einsum("qhd,khd->hqk", query, key)
    logits = np.where(np.tri(len(query), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("tokens", [1, 127, 300, 1100])
@pytest.mark.parametrize("most_logits", [module.LOGITS, 1])
def test_blocks_and_sections_give_what_the_formula_gives(monkeypatch, tokens, most_logits):
    monkeypatch.setattr(module, "LOGITS", most_logits)
    rng = np.random.default_rng(tokens)
    query, key, value = (
        jnp.asarray(rng.normal(size=(tokens, heads, 16)), jnp.float32) for heads in (4, 2, 2)
    )
    # Compiled anew: the size of a block is no argument.
    output = jax.jit(lambda *x: causal_attention(*x, scale=0.25))(query, key, value)
    np.testing.assert_allclose(output, plain(query, key, value, 0.25), atol=1e-5)


def test_a_block_of_logits_stays_below_a_gibibyte():
    assert query_block(100, 32) == 100
    assert query_block(8192, 32) == QUERY_BLOCK
    assert query_block(2**20, 32) == SMALLEST_BLOCK
    for tokens in (2**16, 100_000, 2**19):
        assert SMALLEST_BLOCK <= query_block(tokens, 32) <= QUERY_BLOCK
        assert 4 * query_block(tokens, 32) * 32 * tokens <= 2**30
