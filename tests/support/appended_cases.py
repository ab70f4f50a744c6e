"""Appended tokens' attention beside float64, written out: any way of it, any dtype."""

import jax.numpy as jnp
import numpy as np

from wavejax.attention.appended_attention import Stored, attend

TOKENS, NEW, AT_HAND, ROOM, KV_HEADS, HEADS = 128, 100, 40, 5000, 2, 6


def check_attend(stored_tokens: int, dtype: str, head_dim: int, seed: int, atol: float) -> None:
    """Attend to rows at hand and `stored_tokens` stored ones; what lies past these is NaN."""
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(1, TOKENS, HEADS, head_dim))
    own = rng.normal(size=(KV_HEADS, AT_HAND + TOKENS, 2, head_dim))
    store = rng.normal(size=(KV_HEADS, ROOM, 2, head_dim))
    store[:, stored_tokens:] = np.nan
    place = np.arange(TOKENS)
    causal = (place <= place[:, None]) & (place < NEW)
    held = np.broadcast_to(np.arange(AT_HAND) < AT_HAND - 3, (TOKENS, AT_HAND))
    seen = np.concatenate([held, causal], axis=1)
    given_query, given_own, given_store = (jnp.asarray(x, dtype) for x in (query, own, store))

    def read(start: jnp.ndarray, block: int) -> jnp.ndarray:
        return given_store[:, start + jnp.arange(block)]

    stored = Stored(read, ROOM, jnp.int32(stored_tokens))
    output = np.asarray(attend(given_query, given_own, jnp.asarray(seen), stored), np.float64)
    rounded = (np.asarray(x, np.float64) for x in (given_query, given_own, given_store))
    expected = _by_float64(*rounded, seen, stored_tokens)
    np.testing.assert_allclose(output[0, :NEW], expected[:NEW], atol=atol, err_msg=f"seed {seed}")


def _by_float64(
    query: np.ndarray, own: np.ndarray, store: np.ndarray, seen: np.ndarray, tokens: int
) -> np.ndarray:
    rows = np.concatenate([own, store[:, :tokens]], axis=1)
    seen = np.concatenate([seen, np.ones((len(seen), tokens), bool)], axis=1)
    output = np.empty(query.shape[1:])
    for head in range(HEADS):
        keys, values = np.moveaxis(rows[head * KV_HEADS // HEADS], 1, 0)
        logits = query[0, :, head] @ keys.T / np.sqrt(query.shape[-1])
        weights = np.where(seen, np.exp(logits - logits.max(axis=1, keepdims=True)), 0)
        output[:, head] = weights @ values / weights.sum(axis=1, keepdims=True)
    return output
