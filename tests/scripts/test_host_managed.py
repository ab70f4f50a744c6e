"""The baseline that the host manages attends to the best pages, and to no others of the host's."""

import dataclasses
import functools
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from models.unstacked import unstack_layers
from pallas_kernels.types import Rows
from tests.support.scripts import load_script
from wavejax import DenseAttention, Generator, WaveConfig
from wavejax.attention.retrieval import budgets
from wavejax.evaluation.baselines import SparseAttention, SparseState

PAGE, STEPS = 16, 3

# One module of each, so that each program is compiled once.
load = functools.cache(load_script)


def tiny(**changes):
    return dataclasses.replace(load("decode_model").SHAPES["tiny"], **changes)


def config_of(budget, **changes):
    settings = {"local_tokens": 8, "growth_tokens": 64, "cluster_size": 4, "max_cluster_size": 8}
    settings |= {"segment_tokens": 128, "min_candidate_tokens": 32}
    return WaveConfig(**(settings | changes), min_retrieved_tokens=budget)


def logits_of(attention, model, params, batch, context, tokens):
    """What the generator makes of the same keys and values."""
    dense = Generator(model, DenseAttention())
    sizes = batch, context, len(tokens), "float32"
    state, found = load("decode_state").fill(dense, params, *sizes, real=False).state, []
    if isinstance(attention, SparseAttention):
        held = state.attention_state
        sparse = SparseState(held.keys, held.values, held.tokens, held.tokens + 0)
        state = dataclasses.replace(state, attention_state=sparse)
    generator = Generator(model, attention)
    for step in tokens:
        state = generator.feed(params, state, jnp.asarray(step))
        found.append(np.asarray(state.logits))
    return np.stack(found)


def managed_logits(config, model, params, batch, context, tokens, ahead=False):
    managed = load("host_managed").fill(
        model, config, batch, context, len(tokens), "float32", threads=2, ahead=ahead
    )
    found = np.stack([np.asarray(managed.feed(params, jnp.asarray(step))) for step in tokens])
    managed.pages.close()
    return found, managed


def tokens_of(model, batch):
    return (
        np.random.default_rng(batch).integers(0, model.vocab_size, (STEPS, batch)).astype(np.int32)
    )


@pytest.mark.parametrize(
    "batch, context, unroll, layers, ahead",
    [
        *((1, 300, False, 2, False), (3, 613, True, 2, False)),
        *((1, 300, False, 1, True), (2, 613, True, 5, True)),
    ],
)
def test_all_pages_are_full_attention(batch, context, unroll, layers, ahead):
    model = tiny(num_layers=layers)
    params = load("decode_model").random_params(model, "float32")
    tokens = tokens_of(model, batch)
    expected = logits_of(DenseAttention(), model, params, batch, context, tokens)
    if unroll:
        params = unstack_layers(params)
    found, managed = managed_logits(config_of(10_000), model, params, batch, context, tokens, ahead)
    assert managed.layout.chosen == managed.layout.pages
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_some_pages_are_sparse_attention_by_page_bounds():
    """The method whose accuracy is recorded: with whole pages indexed, the two are one."""
    model, batch, context = tiny(), 2, 4 + 8 + 35 * PAGE
    params = load("decode_model").random_params(model, "float32")
    tokens, config = tokens_of(model, batch), config_of(5 * PAGE - 7)
    sparse = SparseAttention(config=config, rank="page_bound")
    expected = logits_of(sparse, model, params, batch, context, tokens)
    found, managed = managed_logits(config, model, params, batch, context, tokens)
    assert (managed.layout.pages, managed.layout.chosen) == (35, 5)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    full = logits_of(DenseAttention(), model, params, batch, context, tokens)
    assert np.abs(full - expected).max() > 0.01  # or it would say nothing


def test_pages_are_guessed_by_the_input_of_the_layer_before():
    """So a guess is right where that layer adds nothing to its input, and else may be wrong."""
    model, batch, context = tiny(num_layers=4), 2, 651
    tokens, config = tokens_of(model, batch), config_of(3 * PAGE)
    params = load("decode_model").random_params(model, "float32")
    given = model, params, batch, context, tokens
    exact, guessed = (managed_logits(config, *given, ahead)[0] for ahead in (False, True))
    assert np.abs(exact - guessed).max() > 0.01
    stacks = params["params"]["layers"]
    # But for the last one's, or no attention would matter.
    idle = {name: stacks[name].at[:-1].set(0) for name in ("output", "down")}
    params = {"params": params["params"] | {"layers": stacks | idle}}
    given = model, params, batch, context, tokens
    exact, guessed = (managed_logits(config, *given, ahead)[0] for ahead in (False, True))
    np.testing.assert_allclose(guessed, exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kv_heads, context, chosen", [(1, 301, 3), (2, 777, 7), (4, 555, 1)])
def test_attention_is_that_of_an_oracle_in_float64(kv_heads, context, chosen):
    programs = load("host_programs")
    model, batch = tiny(num_kv_heads=kv_heads), 2
    managed = load("host_managed").fill(
        model, config_of(chosen * PAGE), batch, context, 5, "float32", threads=3
    )
    layout, layer = managed.layout, 1
    group = model.num_heads // kv_heads
    rng = np.random.default_rng(context)
    query = rng.normal(size=(batch, kv_heads, group, model.head_dim)).astype(np.float32)
    bounds, offsets = managed.summaries
    ids = np.asarray(
        programs.choose_pages(jnp.asarray(query), bounds[layer], offsets, layout.chosen)
    )
    keys, values, _ = managed.pages.send(layer, ids)
    # Past what a sequence holds on the device there may be anything.
    held = layout.sinks + layout.window
    stacks = managed.steady.keys, managed.steady.values
    spoilt = (Rows(x.data.at[:, :, :, held + 1 :].set(jnp.nan)) for x in stacks)
    steady = dataclasses.replace(
        managed.steady, **dict(zip(("keys", "values"), spoilt, strict=True))
    )
    found = programs.attend(jnp.asarray(query), keys, values, jnp.int32(layer), steady)

    size = batch, kv_heads, layout.pages, PAGE, model.head_dim
    all_keys, all_values = (
        managed.pages.rows[part, layer].view(np.float32).reshape(size).astype(np.float64)
        for part in range(2)
    )
    near_keys, near_values = (
        np.asarray(x.data[layer, :, :, : held + 1], np.float64)
        for x in (managed.steady.keys, managed.steady.values)
    )
    for b in range(batch):
        for h in range(kv_heads):
            q, own = query[b, h].astype(np.float64), all_keys[b, h]
            bound = np.maximum(q[:, None] * own.max(1), q[:, None] * own.min(1)).sum(-1)
            mass = np.exp((bound - bound.max(1, keepdims=True)) * model.head_dim**-0.5)
            mass = (mass / mass.sum(1, keepdims=True)).sum(0)
            best = np.sort(np.argsort(-mass, kind="stable")[: layout.chosen])
            np.testing.assert_array_equal(ids[b, h], best)
            k = np.concatenate([own[best].reshape(-1, model.head_dim), near_keys[b, h]])
            v = np.concatenate(
                [all_values[b, h, best].reshape(-1, model.head_dim), near_values[b, h]]
            )
            logits = q @ k.T * model.head_dim**-0.5
            weights = np.exp(logits - logits.max(1, keepdims=True))
            expected = weights @ v / weights.sum(1, keepdims=True)
            np.testing.assert_allclose(found[b, h], expected, rtol=2e-5, atol=2e-5)
    managed.pages.close()


def test_every_token_is_somewhere_once():
    """And pages, sinks and window hold the keys that full attention's cache holds."""
    model, batch, context = tiny(), 2, 333
    managed = load("host_managed").fill(model, config_of(32), batch, context, 5, "float32", 1)
    generator = Generator(model, DenseAttention())
    filled = load("decode_state").fill(generator, {}, batch, context, 5, "float32", real=False)
    layout = managed.layout
    assert layout.sinks + layout.pages * PAGE + layout.window == context
    assert 8 <= layout.window < 8 + PAGE
    for part, name in enumerate(("keys", "values")):
        dense = np.asarray(getattr(filled.state.attention_state, name).data)[..., :context, :]
        pages = managed.pages.rows[part].view(np.float32)
        pages = pages.reshape(model.num_layers, batch, model.num_kv_heads, -1, model.head_dim)
        near = np.asarray(getattr(managed.steady, name).data)
        held = layout.sinks + layout.window
        parts = near[..., : layout.sinks, :], pages, near[..., layout.sinks : held, :]
        # Two programs, which round the same draws alike but for the last bit.
        np.testing.assert_allclose(np.concatenate(parts, axis=-2), dense, rtol=1e-3, atol=1e-5)
    managed.pages.close()


def test_no_helper_stays_where_filling_fails(monkeypatch):
    managed, before, helpers = load("host_managed"), set(threading.enumerate()), []

    def fail(*_):
        helpers.extend(set(threading.enumerate()) - before)
        raise MemoryError("no room")

    monkeypatch.setattr(managed, "_make_layer", fail)
    with pytest.raises(MemoryError, match="no room"):
        managed.fill(tiny(), config_of(64), 1, 333, 5, "float32", threads=3)
    assert len(helpers) >= 2
    for helper in helpers:
        helper.join(timeout=10)
        assert not helper.is_alive()


@pytest.mark.parametrize("context", [200, 30_720, 122_880, 1_048_576])
def test_the_budget_is_wave_attentions(context):
    programs = load("host_programs")
    for config in (WaveConfig(), WaveConfig(min_retrieved_tokens=0), WaveConfig.paper()):
        indexed = config.indexed_tokens(context)
        expected = int(budgets(config, jnp.int32(indexed))[0])
        assert programs.budget_of(config, context) == expected
        if indexed >= PAGE:
            layout = programs.Layout.of(config, context)
            assert 0 <= layout.chosen * PAGE - min(expected, layout.pages * PAGE) < PAGE
        else:
            with pytest.raises(ValueError, match="has no page of 16 beside the sinks"):
                programs.Layout.of(config, context)


def test_memory_is_counted():
    baselines = load("decode_baselines")
    model, config = tiny(), config_of(64)
    baseline = baselines.HostManagedBaseline(config, threads=1)
    need = baseline.need(model, 2, 777, 5, "float32")
    managed = load("host_managed").fill(model, config, 2, 777, 5, "float32", 1)
    on_device = load("decode_model").memory_of((managed.summaries, managed.steady))
    assert 0 <= need.state - need.cache - on_device < 0.02 * on_device
    blocks = 2 * managed.pages.block_bytes
    assert baseline.pinned(model, 2, 777, "float32") == blocks
    assert need.host == managed.pages.nbytes + blocks
    managed.pages.close()
