"""One block's attention, against float64 attention of the whole prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavejax.attention import causal_block
from wavejax.attention.causal_block import attend_block, block_tokens, section_blocks

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
SCALE = HEAD_DIM**-0.5


def make(tokens):
    rng = np.random.default_rng(tokens)
    shapes = (tokens, HEADS), (tokens, KV_HEADS), (tokens, KV_HEADS)
    return [rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32) for shape in shapes]


def formula(query, key, value):
    """Softmax attention of each token to itself and all before it, in float64."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    output = np.zeros_like(query)
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        for token in range(len(query)):
            logits = SCALE * key[: token + 1, own] @ query[token, head]
            weights = np.exp(logits - logits.max())
            output[token, head] = weights @ value[: token + 1, own] / weights.sum()
    return output


def by_blocks(query, key, value, block):
    """All blocks, with what lies past each one spoilt: no token may see it."""
    parts = []
    for number in range(len(query) // block):
        end = (number + 1) * block
        heads_first = []
        for x in (key, value):
            x = x.copy()
            x[end:] = 1e9
            heads_first.append(jnp.swapaxes(jnp.asarray(x), 0, 1))
        own = jnp.asarray(query[end - block : end])
        attend = functools.partial(attend_block, scale=SCALE)
        parts.append(jax.jit(attend)(own, *heads_first, jnp.int32(number)))
    return np.concatenate(parts)


@pytest.mark.parametrize("tokens, block", [(96, 16), (80, 80), (144, 16)])
def test_blocks_give_what_the_formula_gives(tokens, block):
    operands = make(tokens)
    np.testing.assert_allclose(by_blocks(*operands, block), formula(*operands), atol=2e-6)


def test_the_merge_of_cudnns_parts_gives_what_the_formula_gives(monkeypatch):
    """The same calls, by JAX's plain implementation in cuDNN's place."""
    plain = jax.nn.dot_product_attention

    def attend(*operands, implementation, **options):
        assert implementation == "cudnn"
        return plain(*operands, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(causal_block, "implementation_for", lambda *_: "cudnn")
    operands = make(96)
    np.testing.assert_allclose(by_blocks(*operands, 32), formula(*operands), atol=2e-6)


def test_a_value_that_is_not_finite_reaches_its_own_and_later_tokens_alone():
    query, key, value = make(64)
    value[37, 1, 3] = np.inf
    found = by_blocks(query, key, value, 16)
    expected = formula(*make(64))
    np.testing.assert_allclose(found[:37], expected[:37], atol=2e-6)
    np.testing.assert_allclose(found[37:, :2], expected[37:, :2], atol=2e-6)
    assert np.isnan(found[37:, 2:]).all()


def test_blocks_divide_the_padded_prompt():
    for tokens in (128, 160, 320, 896, 1280, 65536):
        block = block_tokens(tokens, 9, jnp.float32, 64)
        assert tokens % block == 0
        assert block in (32, 64, 128)
        blocks = tokens // block
        assert -(-blocks // section_blocks(blocks)) <= 8
