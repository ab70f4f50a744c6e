"""`score_clusters`, `attend_zones`, `merge_states`, `append_rows` against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.types import MASKED, NO_ID
from tests.support.zone_operands import zone_operands

SPACES = {"device": jax.memory.Space.Device, "host": jax.memory.Space.Host}


def softmax_attention(query, keys, values, weights, scale):
    """float64: output and log of the weighted sum of exponentials, one query head."""
    logits = scale * keys @ query + np.log(weights)
    peak = logits.max()
    mass = np.exp(logits - peak)
    return mass @ values / mass.sum(), peak + np.log(mass.sum())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("group", [1, 7])
def test_score_clusters(group, dtype):
    rng = np.random.default_rng(group)
    query = jnp.asarray(rng.normal(size=(2, 3, group, 48)), dtype)
    centroids = jnp.asarray(rng.normal(size=(2, 2, 3, 9, 48)), dtype)
    sizes = rng.integers(0, 4, (2, 2, 3, 9))
    sizes[1, 1, 2] = 0  # a row without clusters
    offsets = np.concatenate([np.zeros((2, 2, 3, 1), int), sizes.cumsum(-1)], -1)
    found = ops.score_clusters(query, centroids, jnp.asarray(offsets, jnp.int32), 1, scale=0.2)
    exact = 0.2 * np.einsum(
        "bhgd,bhcd->bhgc", *(np.asarray(x, np.float64) for x in (query, centroids[1]))
    )
    present = np.broadcast_to(sizes[1][:, :, None] > 0, exact.shape)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(found.logits)[present], exact[present], atol=tolerance)
    assert (np.asarray(found.logits)[~present] <= MASKED / 2).all()
    with np.errstate(divide="ignore"):
        total = np.log((sizes[1][:, :, None] * np.exp(exact)).sum(-1))
    total[1, 2] = MASKED
    np.testing.assert_allclose(found.logsumexp, total, rtol=1e-3, atol=tolerance)


def zone_case(rng, group, slots, dtype=np.float32):
    """Random zones; every row that must not be read is NaN."""
    layers, batch, heads, clusters, head_dim, tokens, room = 2, 2, 3, 5, 32, 40, 12

    def random(*shape):
        return rng.normal(size=shape).astype(np.float32)

    case = {
        "query": random(batch, heads, group, head_dim),
        "sink": random(layers, batch, heads, 4, 2, head_dim),
        "sink_tokens": np.array([4, 2]),
        "window": random(layers, batch, heads, 9, 2, head_dim),
        "window_tokens": np.array([6, 0]),
        "store": random(layers, batch, heads, tokens, 2, head_dim),
        "cache_rows": random(layers, batch, heads, slots, 2, head_dim),
        "tokens": np.full((batch, heads, room), NO_ID),
        "slots": np.full((batch, heads, room), NO_ID),
        "hit": np.zeros((batch, heads, room), bool),
        "logits": random(batch, heads, group, clusters),
        "value_means": random(layers, batch, heads, clusters, head_dim),
        "offsets": np.broadcast_to(np.arange(0, 41, 8), (layers, batch, heads, 6)).copy(),
        # Some more than the eight that each has.
        "remaining": rng.integers(0, 12, (batch, heads, clusters)),
        "layer": 1,
    }
    case["remaining"][..., 2] = 0
    case["sink"][:, 1, :, 2:] = np.nan
    case["window"][:, 0, :, 6:] = np.nan
    case["window"][:, 1] = np.nan
    for b in range(batch):
        for h in range(heads):
            count = 7 if (b, h) != (1, 2) else 0  # a row that retrieves nothing
            tokens_of_row = rng.permutation(tokens)[:count]
            free = list(rng.permutation(slots))
            for i, token in enumerate(tokens_of_row):
                case["tokens"][b, h, i] = token
                if free:
                    slot = free.pop()
                    case["slots"][b, h, i] = slot
                    if i % 2:
                        case["hit"][b, h, i] = True
                        case["cache_rows"][1, b, h, slot] = case["store"][1, b, h, token]
            needed = set(tokens_of_row) - set(case["tokens"][b, h][case["hit"][b, h]])
            for token in set(range(tokens)) - needed:
                if token != 0:  # row 0 stands in for rows that are not read
                    case["store"][1, b, h, token] = np.nan
    return case


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("slots", [1, 4, 20])
@pytest.mark.parametrize("group", [1, 7])
def test_attend_zones(group, slots, space):
    rng = np.random.default_rng(10 * slots + group)
    case = zone_case(rng, group, slots)
    original = {name: np.copy(value) for name, value in case.items()}
    arrays = {name: jnp.asarray(value) for name, value in case.items() if name != "layer"}
    arrays["store"] = jax.device_put(case["store"], SPACES[space])
    found = jax.jit(lambda a: ops.attend_zones(*zone_operands(a), jnp.int32(1), scale=0.3))(arrays)
    output, logsumexp = ops.merge_states(found.outputs, found.logsumexps)
    assert np.isfinite(np.asarray(output)).all()
    for b in range(2):
        for h in range(3):
            c = {
                name: value[1, b, h]
                for name, value in original.items()
                if np.ndim(value) >= 4 and value.shape[0] == 2 and name not in ("query", "logits")
            }
            listed = original["tokens"][b, h]
            rows = []
            for token, slot, hit in zip(
                listed, original["slots"][b, h], original["hit"][b, h], strict=True
            ):
                if token == NO_ID:
                    continue
                row = c["cache_rows"][slot] if hit else c["store"][token]
                rows.append(row)
                if slot != NO_ID:  # admitted, or there before
                    np.testing.assert_array_equal(found.cache_rows.data[1, b, h, slot], row)
            steady = [
                *c["sink"][: original["sink_tokens"][b]],
                *c["window"][: original["window_tokens"][b]],
            ]
            remaining = np.minimum(original["remaining"][b, h], 8)
            for g in range(group):
                query = original["query"][b, h, g].astype(np.float64)
                exact = np.array([*steady, *rows], np.float64)
                keys, values = exact[:, 0], exact[:, 1]
                logits = np.concatenate([0.3 * keys @ query, original["logits"][b, h, g]])
                values = np.concatenate([values, c["value_means"]])
                weights = np.concatenate([np.ones(len(exact)), remaining])
                with np.errstate(divide="ignore"):
                    mass = np.exp(logits) * weights
                np.testing.assert_allclose(
                    output[b, h, g], mass @ values / mass.sum(), atol=2e-6, rtol=2e-5
                )
                assert logsumexp[b, h, g] == pytest.approx(np.log(mass.sum()), abs=1e-5)
    np.testing.assert_array_equal(found.cache_rows.data[0], original["cache_rows"][0])


def test_merge_states_of_parts_is_attention_over_all():
    rng = np.random.default_rng(0)
    keys, values, query = rng.normal(size=(30, 16)), rng.normal(size=(30, 16)), rng.normal(size=16)
    cuts = [slice(0, 3), slice(3, 20), slice(20, 30)]
    parts = [softmax_attention(query, keys[c], values[c], np.ones(30)[c], 1.0) for c in cuts]
    outputs = jnp.asarray([output for output, _ in parts], jnp.float32)[:, None, None, None]
    logsumexps = jnp.asarray([lse for _, lse in parts], jnp.float32)[:, None, None, None]
    # An empty part, poisoned.
    outputs = jnp.concatenate([outputs, jnp.full_like(outputs[:1], jnp.nan)])
    logsumexps = jnp.concatenate([logsumexps, jnp.full_like(logsumexps[:1], MASKED)])
    output, logsumexp = ops.merge_states(outputs, logsumexps)
    expected, total = softmax_attention(query, keys, values, np.ones(30), 1.0)
    np.testing.assert_allclose(output[0, 0, 0], expected, atol=1e-6)
    assert float(logsumexp[0, 0, 0]) == pytest.approx(total, abs=1e-5)


def test_merge_states_of_nothing_is_zero():
    output, logsumexp = ops.merge_states(
        jnp.full((3, 1, 2, 1, 8), jnp.nan), jnp.full((3, 1, 2, 1), MASKED)
    )
    np.testing.assert_array_equal(output, 0)
    assert (np.asarray(logsumexp) <= MASKED / 2).all()


@pytest.mark.parametrize("space", SPACES)
def test_append_rows_writes_in_place(space):
    store = jax.device_put(np.zeros((2, 2, 3, 20, 2, 8), np.float32), SPACES[space])
    address = store.unsafe_buffer_pointer()
    rows = jax.random.normal(jax.random.key(0), (3, 5, 2, 8))
    append = jax.jit(ops.append_rows, donate_argnums=0)
    written = append(ops.Rows(store), rows, jnp.int32(1), jnp.int32(0), jnp.int32(7)).data
    expected = np.zeros((2, 2, 3, 20, 2, 8), np.float32)
    expected[1, 0, :, 7:12] = rows
    np.testing.assert_array_equal(written, expected)
    assert written.unsafe_buffer_pointer() == address
    assert written.sharding.memory_kind == ("pinned_host" if space == "host" else "device")
