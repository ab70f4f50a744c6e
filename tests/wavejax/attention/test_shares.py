"""Shares of tokens, which the device counts in float32: a share that is whole is itself."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavejax import WaveConfig
from wavejax.attention.retrieval import _share, budgets

TOKENS = np.concatenate([np.arange(1, 4097), 1000 * np.arange(5, 2000, 7)])


@pytest.mark.parametrize("text", ["0.009", "0.018", "0.1", "0.25", "0.3", "0.35", "0.6", "0.7"])
def test_a_whole_share_is_not_rounded_up_past_itself(text):
    """0.3 of 170 tokens are 51, though the product of float32 numbers is a little more."""
    found = np.asarray(jax.jit(lambda tokens: _share(float(text), tokens))(jnp.asarray(TOKENS)))
    exact = [Fraction(text) * int(tokens) for tokens in TOKENS]
    up = np.array([math.ceil(share) for share in exact])
    # Of half a million tokens and more a millionth is nearly a token.
    whole = np.array([share.denominator == 1 for share in exact]) & (up < 500_000)
    assert whole.sum() > 5
    np.testing.assert_array_equal(found[whole], up[whole])
    # Others are rounded up, but for what a millionth may hide.
    nearly = np.array([math.ceil(share * (1 - Fraction(1, 500_000))) for share in exact])
    assert ((nearly <= found) & (found <= up)).all()
    assert (found[TOKENS < 4097] == up[TOKENS < 4097]).all()


def test_shares_would_be_rounded_up_past_themselves():
    """Without a margin: some product of float32 numbers is above the whole number that it is."""
    product = np.float32(0.3) * TOKENS.astype(np.float32)
    above = np.ceil(product) > np.array([math.ceil(Fraction(3, 10) * int(n)) for n in TOKENS])
    assert above.sum() > 5


def test_the_ends_of_a_share():
    tokens = jnp.array([0, 1, 17, 2**20 + 1], jnp.int32)
    assert _share(1.0, tokens).tolist() == tokens.tolist()
    assert _share(0.0, tokens).tolist() == [0, 0, 0, 0]
    # A share of anything is at least one.
    assert _share(1e-6, tokens).tolist() == [0, 1, 1, 2]


def test_a_budget_of_a_whole_share_is_that_share():
    config = WaveConfig(
        retrieval_fraction=0.3, candidate_fraction=0.7,
        min_retrieved_tokens=0, min_candidate_tokens=0,
    )  # fmt: skip
    for tokens in (170, 340, 1730):
        retrieved, candidates = budgets(config, jnp.array([tokens], jnp.int32))
        assert (int(retrieved[0]), int(candidates[0])) == (tokens * 3 // 10, tokens * 7 // 10)
