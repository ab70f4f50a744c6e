"""`fetch="staged"`: the tokens that rows read in place give, and every row where it should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import NO_ID
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, SAMPLED, make_params, make_prompts
from wavejax import Generator, WaveAttention
from wavejax.engine.facts import facts_of
from wavejax.engine.generator import NO_TOKEN
from wavejax.store import rows
from wavejax.store.host_rows import HostRows
from wavejax.store.shape import CacheShape

# With 90 new tokens the long prompts' indexes grow once, and the short one's begins.
LENGTHS, NEW_TOKENS = (5, 262, 318), 90


def generators(config, sampler=GREEDY, stop_tokens=()):
    return [
        Generator(MODEL, WaveAttention(config, fetch=fetch), sampler, stop_tokens)
        for fetch in ("in_place", "staged")
    ]


def run(generator, prompts, pieces=(NEW_TOKENS,), seed=1):
    state = generator.start(make_params(), prompts, NEW_TOKENS, seed)
    tokens = []
    for steps in pieces:
        state, some = generator.decode_n(make_params(), state, steps)
        tokens.append(np.asarray(some))
    return state, np.concatenate(tokens)


def counts_of(on_device):
    cache = on_device.cache
    return cache.table, on_device.attended, on_device.steady.window_tokens


ONE_SLOT = dataclasses.replace(CONFIG, cache_fraction=0.0)
CHOOSY = dataclasses.replace(
    CONFIG, cache_fraction=0.02, admission_ratio=2.0, pooled_covariance=True
)


@pytest.mark.slow(75)
@pytest.mark.parametrize(
    "config", [CONFIG, ONE_SLOT, CHOOSY], ids=["cache", "one slot", "rows worth reading, pooled"]
)
def test_a_ragged_batch_gets_the_tokens_that_rows_in_place_give(config):
    prompts = make_prompts(LENGTHS)
    (state, tokens), (staged, found) = (run(one, prompts) for one in generators(config))
    np.testing.assert_array_equal(found, tokens)
    np.testing.assert_allclose(staged.logits, state.logits, atol=1e-4)
    on_device, in_place = staged.attention_state.on_device, state.attention_state
    # All three have grown; what is retrieved and cached is the same, step for step.
    assert on_device.index.tokens.tolist() == in_place.index.tokens.tolist() == [64, 306, 362]
    jax.tree.map(np.testing.assert_array_equal, counts_of(on_device), counts_of(in_place))
    assert int(on_device.cache.table.misses.sum()) > 0
    for b in range(3):
        indexed = int(on_device.index.tokens[b])
        stored = staged.attention_state.rows.rows[:, b, :, :indexed]
        expected = np.asarray(in_place.store.rows.data)[:, b, :, :indexed]
        np.testing.assert_allclose(stored, expected, atol=1e-4)
        # A slot that holds a row holds that very row.
        owners = np.asarray(on_device.cache.table.token_of_slot[:, b])
        for layer, head, slot in zip(*np.nonzero(owners >= 0), strict=True):
            np.testing.assert_array_equal(
                on_device.cache.rows.data[layer, b, head, slot],
                stored[layer, head, owners[layer, head, slot]],
            )
    facts = facts_of(WaveAttention(config), staged.attention_state)
    assert facts == facts_of(WaveAttention(config), in_place)
    assert facts.host_bytes == staged.attention_state.rows.nbytes


@pytest.mark.slow(45)
def test_sampling_stop_tokens_and_pieces():
    prompts = make_prompts(LENGTHS[:2])
    in_place, staged = generators(CONFIG, SAMPLED, (9, 17))
    _, tokens = run(in_place, prompts)
    assert (tokens == NO_TOKEN).any()
    for pieces in [(NEW_TOKENS,), (1, 8, 30, NEW_TOKENS - 39)]:
        state, found = run(staged, prompts, pieces)
        np.testing.assert_array_equal(found, tokens)
    assert state.finished.tolist() == (tokens[-1] == NO_TOKEN).tolist()


@pytest.mark.slow(30)
def test_the_stream_and_teacher_forcing():
    prompts = make_prompts(LENGTHS[1:2])
    in_place, staged = generators(CONFIG)
    state = staged.start(make_params(), prompts, NEW_TOKENS)
    tokens = np.concatenate([t for _, t in staged.stream(make_params(), state, 12)])
    expected = in_place.start(make_params(), prompts, NEW_TOKENS)
    _, logits = in_place.force(make_params(), expected, jnp.asarray(tokens))
    state = staged.start(make_params(), prompts, NEW_TOKENS)
    state, found = staged.force(make_params(), state, jnp.asarray(tokens))
    np.testing.assert_allclose(found, logits, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(found, axis=-1), tokens)
    assert staged.attention.lengths(state.attention_state.on_device).tolist() == [LENGTHS[1] + 12]


@pytest.mark.slow
def test_half_precision_runs():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    staged = generators(CONFIG)[1]
    state = staged.start(params, make_prompts(LENGTHS[1:2]), NEW_TOKENS)
    assert state.attention_state.rows.rows.dtype == jnp.bfloat16
    state, tokens = staged.decode_n(params, state, 4)
    assert np.isfinite(state.logits).all()
    assert (np.asarray(tokens) >= 0).all()


def test_the_platform_chooses(monkeypatch):
    assert not WaveAttention(CONFIG).staged
    for backend, fetch in [("cpu", "in_place"), ("gpu", "in_place"), ("tpu", "staged")]:
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert rows.best_fetch() == fetch
        assert WaveAttention(CONFIG).staged == (fetch == "staged")
        assert not WaveAttention(CONFIG, "device", "staged").staged
        assert WaveAttention(CONFIG, "host", "staged").staged
        assert not WaveAttention(CONFIG, "host", "in_place").staged


def test_nothing_of_the_state_is_pinned():
    for fetch, kinds in [("staged", {"device"}), ("in_place", {"device", "pinned_host"})]:
        state = WaveAttention(CONFIG, fetch=fetch).init_state(
            CacheShape.of(MODEL), 1, 300, 1, jnp.float32
        )
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == kinds


def test_rows_are_gathered_side_by_side():
    rng = np.random.default_rng(0)
    rows = HostRows((2, 3, 2, 50, 2, 4), 40, np.float32)
    rows.put((slice(None),), jnp.asarray(rng.normal(size=rows.rows.shape), jnp.float32))
    # The last row there is among them: lists end with a number that is none.
    for most, width in [(0, 16), (1, 16), (16, 16), (17, 32), (33, 40), (40, 40)]:
        tokens = np.full((3, 2, 40), NO_ID, np.int32)
        counts = rng.integers(0, most + 1, (3, 2))
        counts[1, 1] = most
        for b, h in np.ndindex(3, 2):
            tokens[b, h, : counts[b, h]] = rng.permutation(50)[: counts[b, h]]
        block = rows.gather(1, tokens)
        assert block.shape == (3, 2, width, 2, 4)
        for b, h in np.ndindex(3, 2):
            listed = tokens[b, h, : counts[b, h]]
            np.testing.assert_array_equal(block[b, h, : counts[b, h]], rows.rows[1, b, h, listed])


def test_a_block_outlives_the_next_one():
    rows = HostRows((2, 1, 1, 20, 2, 4), 16, np.float32)
    rows.rows[0], rows.rows[1] = 1, 2
    tokens = np.arange(16, dtype=np.int32)[None, None]
    # Of an odd number of layers, the last and the next step's first.
    for layers in [(0, 1), (1, 0), (0, 0)]:
        first, second = (rows.gather(layer, tokens) for layer in layers)
        assert not np.shares_memory(first, second)
        assert (first == 1 + layers[0]).all()
        assert (second == 1 + layers[1]).all()
