"""Rows in int8: the attention of the rounded rows, number for number, through growth and cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.rounding import dequantise, quantise
from pallas_kernels.types import Rows
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import Generator, InputError, WaveAttention, WaveConfig, load_document, save_document
from wavejax.attention.audit import exact_output
from wavejax.planning.memory import memory_need
from wavejax.store.rows import RowStore
from wavejax.store.shape import CacheShape

SHAPE = model_of(kv_heads=2, group=2, head_dim=16)
INT8 = dataclasses.replace(CONFIG, row_dtype="int8")
STEPS = 100


class RoundedFloats(WaveAttention):
    """Wave attention whose stored rows are floats, rounded as int8 rows are."""

    def write_prompt(self, *operands, **named):
        return _rounded(super().write_prompt(*operands, **named))

    def grow(self, state):
        return _rounded(super().grow(state))


def _rounded(state):
    floats = dequantise(quantise(state.store.rows.data))
    return dataclasses.replace(state, store=RowStore(Rows(floats)))


@pytest.mark.slow(60)
@settings(max_examples=3, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=2),
    cache_fraction=st.sampled_from([0.02, 0.3]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_attention_of_the_rounded_rows(lengths, cache_fraction, seed):
    """Prefill, steps and growth, hits and misses: outputs, store and row cache are equal."""
    stream = random_stream(SHAPE, np.random.default_rng(seed), 300 + STEPS, 2)
    states, outputs = [], []
    for kind, row_dtype in ((WaveAttention, "int8"), (RoundedFloats, "model")):
        config = dataclasses.replace(CONFIG, cache_fraction=cache_fraction, row_dtype=row_dtype)
        attention = kind(config, "device", cached=True)
        state = attention.init_state(CacheShape.of(SHAPE), 2, 300, STEPS, jnp.float32)
        _, state = prefill(attention, state, stream, lengths, room=300)
        found, state = decode(attention, state, stream, jnp.asarray(lengths, jnp.int32), STEPS)
        outputs.append(np.asarray(found))
        states.append(state)
    np.testing.assert_array_equal(*outputs)
    state, expected = states
    jax.tree.map(np.testing.assert_array_equal, state.index, expected.index)
    jax.tree.map(np.testing.assert_array_equal, state.cache.table, expected.cache.table)
    assert int(state.cache.table.hits.sum()) > 0 or max(lengths) < 80
    assert state.store.rows.dtype == state.cache.rows.dtype == jnp.int8
    _, keys, values = (np.asarray(x) for x in stream)
    rows = np.stack([keys, values], axis=-2).swapaxes(1, 2)
    for b in range(2):
        indexed, sinks = int(state.index.tokens[b]), min(4, lengths[b])
        stored = jax.tree.map(lambda x, b=b, n=indexed: x[0, b, :, :n], state.store.rows)
        # Those of growth too: rounded once, from the numbers that the model gave.
        given_rows = quantise(jnp.asarray(rows[b, :, sinks : sinks + indexed]))
        jax.tree.map(np.testing.assert_array_equal, stored, given_rows)
        owners = np.asarray(state.cache.table.token_of_slot[0, b])
        for h, slot in zip(*np.nonzero(owners >= 0), strict=True):
            np.testing.assert_array_equal(
                state.cache.rows.data[0, b, h, slot], stored.data[h, owners[h, slot]]
            )
            np.testing.assert_array_equal(
                state.cache.rows.scales[0, b, h, slot], stored.scales[h, owners[h, slot]]
            )


@pytest.mark.slow(90)
def test_all_ways_to_hold_rows_give_the_same_tokens(tmp_path):
    """On the device, in host memory and staged; appended to, kept and gone on with."""
    params, (whole, short) = make_params(), make_prompts((318, 5))
    tokens = {}
    for name, store, fetch in (
        ("device", "device", None),
        ("host", "host", "in_place"),
        ("staged", "host", "staged"),
    ):
        generator = Generator(MODEL, WaveAttention(INT8, store, fetch), GREEDY)
        state = generator.start(params, [whole[:300]], 90)
        state = generator.append(params, state, whole[300:])
        given = {"generator": generator, "params": params}
        save_document(state, tmp_path / name, token_ids=whole, **given)
        state, found = generator.decode_n(params, state, 70)
        held = state.attention_state
        on_device = held.on_device if name == "staged" else held
        assert int(on_device.index.tokens[0]) > INT8.indexed_tokens(300)
        assert on_device.cache.rows.dtype == jnp.int8
        if name == "staged":
            assert held.rows.rows.dtype == np.int8
        document = load_document(tmp_path / name, **given)
        _, gone_on = generator.decode_n(params, document.start(generator, 90), 70)
        np.testing.assert_array_equal(gone_on, found)
        # Cut: the rows after the cut come back as numbers, and are rounded as they were.
        cut = document.start(generator, 10, params=params, prompts=[[*whole[:150], *short]])
        tokens[name] = np.asarray(found), np.asarray(generator.decode_n(params, cut, 8)[1])
    for other in ("host", "staged"):
        for found, expected in zip(tokens[other], tokens["device"], strict=True):
            np.testing.assert_array_equal(found, expected)
    plain = Generator(MODEL, WaveAttention(CONFIG, "host"), GREEDY)
    with pytest.raises(InputError, match="row_dtype is 'int8' there and 'model' here"):
        load_document(tmp_path / "host", generator=plain, params=params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_plan_counts_levels_and_scales(dtype):
    """Levels in host memory, their scales on the device; and half of the rows' bytes, or less."""
    need, plain = (
        memory_need(MODEL, WaveAttention(config, "host", "in_place"), 3, 318, 90, dtype)
        for config in (INT8, CONFIG)
    )
    assert need.rows * jnp.dtype(dtype).itemsize == plain.rows
    state = WaveAttention(INT8, "host", "in_place").init_state(
        CacheShape.of(MODEL), 3, 384, 128, dtype
    )
    stored = state.store.rows
    assert stored.data.sharding.memory_kind == "pinned_host"
    assert stored.scales.sharding.memory_kind == "device"
    assert need.index == plain.index
    scales = stored.scales.nbytes * need.rows // stored.data.nbytes
    assert need.steady == plain.steady + scales


def test_an_audit_reads_the_numbers():
    """By plain float32 attention over the rows that were rounded, and those that were not."""
    attention = WaveAttention(INT8, "device")
    stream = random_stream(SHAPE, np.random.default_rng(3), 200, 1)
    state = attention.init_state(CacheShape.of(SHAPE), 1, 200, 1, jnp.float32)
    _, state = prefill(attention, state, stream, [200])
    query, keys, values = (np.asarray(x[0], np.float64) for x in stream)
    indexed = slice(4, 4 + int(state.index.tokens[0]))
    for rows in (keys, values):
        rounded = dequantise(quantise(jnp.asarray(rows[indexed], jnp.float32)))
        rows[indexed] = np.asarray(rounded, np.float64)
    logits = keys[:, 1] @ query[7, 3] / 4
    weights = np.exp(logits - logits.max())
    at = (jnp.int32(0), jnp.int32(0), jnp.int32(1), jnp.asarray(query[7, 3], jnp.float32))
    exact = functools.partial(exact_output, scale=0.25)
    found = jax.jit(exact)(*at, state, state.steady.window_tokens)
    np.testing.assert_allclose(found, weights @ values[:, 1] / weights.sum(), atol=1e-5)


def test_there_are_two_dtypes():
    with pytest.raises(InputError, match="`row_dtype` is int4; it must be one of model, int8"):
        WaveConfig(row_dtype="int4")
