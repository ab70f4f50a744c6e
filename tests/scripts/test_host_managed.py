"""The baseline that the host manages attends to the best pages, and to no others of the host's."""

import dataclasses
import gc
import importlib
import sys
import threading
import time
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import Rows
from wavejax import DenseAttention, Generator, WaveConfig
from wavejax.attention.retrieval import budgets
from wavejax.evaluation.baselines import SparseAttention, SparseState

ROOT = Path(__file__).parents[2]
PAGE, STEPS = 16, 3


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """Scripts import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


def load(name):
    return importlib.import_module(name)


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
    return np.random.default_rng().integers(0, model.vocab_size, (STEPS, batch)).astype(np.int32)


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
        params = load("models.unstacked").unstack_layers(params)
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
    rng = np.random.default_rng()
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


@pytest.mark.parametrize("pinned", ["at once", "by numpy", ""])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_pages_stay_as_they_were_sent(monkeypatch, pinned, dtype):
    host_pages = load("host_pages")
    if pinned == "by numpy":
        monkeypatch.setattr(host_pages, "ADDRESSES", (lambda _: 1 / 0, host_pages.ADDRESSES[1]))
    if not pinned:
        monkeypatch.setattr(host_pages.Block, "_sees_changes", lambda self: False)
    shape, chosen = (3, 2, 3, 11, 64), 5
    pages = host_pages.HostPages(shape, dtype, chosen, threads=3)
    assert pages.pinned == bool(pinned)
    rng = np.random.default_rng()
    size = (3, 2, 3, 11, PAGE, 64)
    written = [jnp.asarray(rng.normal(size=size), dtype) for _ in range(2)]
    for layer in range(3):
        for sequence in range(2):
            pages.put(layer, sequence, *(x[layer, sequence] for x in written))
    sent = []
    for turn in range(7):
        ids = np.stack(
            [np.sort(rng.permutation(11)[:chosen]) for _ in range(6)], dtype=np.int32
        ).reshape(2, 3, chosen)
        sent.append((turn % 3, ids, *pages.send(turn % 3, ids)[:2]))
    for layer, ids, *found in sent:
        for part, x in zip(written, found, strict=True):
            expected = np.take_along_axis(
                np.asarray(part[layer]), ids[..., None, None].astype(int), axis=2
            )
            np.testing.assert_array_equal(np.asarray(x), expected.reshape(2, 3, -1, 64))
    assert pages.choose_threads().keys() >= {1}
    assert pages.send_rate() > 0
    pages.close()


def test_helpers_keep_no_pages():
    """Or what a failure leaves behind would take the next configuration's memory."""
    pages = load("host_pages").HostPages((1, 1, 2, 9, 64), "float32", 4, threads=3)
    pages.send(0, np.zeros((1, 2, 4), np.int32))
    rows = weakref.ref(pages.rows)
    del pages
    for _ in range(100):
        gc.collect()
        if rows() is None:
            break
        time.sleep(0.05)
    assert rows() is None


def test_what_fails_in_a_helper_is_raised(monkeypatch):
    pages = load("host_pages").HostPages((1, 1, 2, 9, 64), "float32", 4, threads=3)
    caller, take = threading.get_ident(), np.take

    def fail(*operands):
        if threading.get_ident() != caller:
            raise ValueError("not here")
        return take(*operands)

    monkeypatch.setattr(np, "take", fail)
    with pytest.raises(ValueError, match="not here"):
        pages.send(0, np.zeros((1, 2, 4), np.int32))
    pages.close()


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
    assert need.host == managed.pages.nbytes + 2 * managed.pages.block_bytes
    managed.pages.close()
