"""A prompt's index: built of many segments at once, the same as one after another."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from tests.support.attention_harness import model_of, random_stream
from tests.support.lowering import lower_for
from wavejax import WaveAttention, WaveConfig
from wavejax.store import index as module
from wavejax.store.index import segments_at_once
from wavejax.store.shape import CacheShape

# Clusters of 8 tokens below 128 of them, of 16 below 256, else of 32.
CONFIG = WaveConfig(
    local_tokens=8,
    growth_tokens=16,
    segment_tokens=64,
    cluster_size=32,
    max_cluster_size=64,
    min_clusters=8,
)
LAYERS, BATCH, HEADS, DIM = 2, 3, 2, 16
MODEL = model_of(layers=LAYERS, kv_heads=HEADS, head_dim=DIM)
SEGMENTS = 7
ROOM = SEGMENTS * CONFIG.segment_tokens
LAYER, SEQUENCE = jnp.int32(1), jnp.int32(2)


def empty(config, dtype=jnp.float32):
    return module.init_index(config, CacheShape.of(MODEL), BATCH, 150, ROOM, 0, dtype)


def make_rows(seed, dtype=jnp.float32):
    shape = (HEADS, ROOM, 2, DIM)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 1, dtype)


@functools.partial(jax.jit, static_argnums=1)
def append(index, config, start, rows, counts, tokens):
    return module.append_segments(index, config, LAYER, SEQUENCE, start, rows[None], counts, tokens)


def one_by_one(index, config, rows, count):
    """The meaning of `append_prompt`."""
    size = config.segment_tokens
    for start in range(0, ROOM, size):
        counts = jnp.clip(jnp.full(1, count - start, jnp.int32), 0, size)
        own = rows[:, start : start + size]
        index = append(index, config, jnp.int32(start), own, counts, jnp.int32(count))
    return index


def assert_same(found, expected):
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


# None at all, a part of the first segment, a ragged one with empty ones behind it, all.
COUNTS = (0, 5, 3 * 64, 3 * 64 + 1, 5 * 64 - 1, ROOM)


@pytest.mark.parametrize("rows_at_once", [HEADS * 2, HEADS * 3, 128])
@pytest.mark.parametrize("codes", [True, False])
def test_many_at_once_are_one_after_another(monkeypatch, rows_at_once, codes):
    """In even calls, in calls and a rest, in one call."""
    monkeypatch.setattr(module, "HEAD_SEGMENTS_AT_ONCE", rows_at_once)
    config = WaveConfig(**{**vars(CONFIG), "token_codes": codes})
    at_once = jax.jit(lambda w, *args: module.append_prompt(w, config, LAYER, SEQUENCE, *args))
    for count in COUNTS:
        rows = make_rows(count).at[:, count:].set(jnp.nan)
        found = at_once(empty(config), rows, jnp.int32(count))
        expected = one_by_one(empty(config), config, rows, count)
        assert_same(found, expected)
        assert int(found.offsets[LAYER, SEQUENCE, 0, -1]) == count


@pytest.mark.parametrize("segments, kv_heads", [(1, 8), (16, 8), (17, 8), (80, 8), (9, 200)])
def test_calls_are_even_and_bounded(segments, kv_heads):
    at_once = segments_at_once(segments, kv_heads)
    assert at_once == 1 or at_once * kv_heads <= module.HEAD_SEGMENTS_AT_ONCE
    calls = -(-segments // at_once)
    assert calls == -(-segments // max(1, module.HEAD_SEGMENTS_AT_ONCE // kv_heads))
    assert calls * at_once - segments < calls


def test_prompts_of_a_batch_do_not_meet(monkeypatch):
    """Ragged prompts in one bucket, one of them after a longer one in the same place."""
    attention, lengths = WaveAttention(CONFIG, "device"), (300, 41, 12)
    stream = random_stream(MODEL, np.random.default_rng(0), 300, BATCH)

    def read(state, order):
        for b in order:
            key, value = (jnp.pad(x[b, : lengths[b]], PADDING[lengths[b]]) for x in stream[1:])
            where = {"sequence": jnp.int32(b), "length": jnp.int32(lengths[b])}
            state = write(attention, LAYER, key, value, state, **where)
            state = attention.finish_prefill(state, *where.values())
        return state

    write = jax.jit(lambda a, *args, **where: a.write_prompt(*args, **where), static_argnums=0)
    PADDING = {n: ((0, 300 - n), (0, 0), (0, 0)) for n in lengths}
    state = attention.init_state(CacheShape.of(MODEL), BATCH, 300, 20, jnp.float32)
    together = read(state, (0, 1, 2))
    assert together.index.tokens.tolist() == [CONFIG.indexed_tokens(n) for n in lengths]
    assert_same(read(together, (2, 0, 1)).index, together.index)
    monkeypatch.setattr(module, "HEAD_SEGMENTS_AT_ONCE", 1)
    jax.clear_caches()
    assert_same(read(state, (0, 1, 2)), together)
    jax.clear_caches()


@pytest.mark.parametrize("segments, calls", [(5, 1), (64, 1), (80, 1), (65, 2)])
def test_kernels_get_all_segments_in_one_call(monkeypatch, segments, calls):
    """One call of 64 segments at most, 128 rows; in a loop, and one for a rest."""

    def by_kernels(op, implementation, implementations, *args, **kwargs):
        return implementations.get("triton", implementations["xla"])(*args, **kwargs)

    monkeypatch.setattr(dispatch, "call", by_kernels)
    config, rows = CONFIG, jax.ShapeDtypeStruct((2, segments * 64, 2, 64), jnp.bfloat16)
    index = jax.eval_shape(
        lambda: module.init_index(
            config, CacheShape(1, 2, 64), 1, 12 * segments, segments * 64, 0, jnp.bfloat16
        )
    )
    zero = jnp.int32(0)
    text = lower_for(
        "cuda",
        lambda w, r, n: module.append_prompt(w, config, zero, zero, r, n),
        *(index, rows, jax.ShapeDtypeStruct((), jnp.int32)),
    )
    for kernel in ("cut_clusters", "average_pieces", "encode_tokens"):
        assert len(re.findall(f'name = "{kernel}"', text)) == calls
    at_once = segments_at_once(segments, 2)
    assert f"tensor<{2 * at_once}x64x64xbf16>" in text
