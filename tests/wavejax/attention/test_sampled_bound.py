"""The sampled bound: draws as probable as they say they are, and a bound that holds as often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import model_of, prefill, random_stream
from wavejax import WaveAttention, WaveConfig
from wavejax.attention.sampled_bound import bound_of_draws, draw_tokens
from wavejax.store.shape import CacheShape

TRIALS, HEAD_DIM = 10_000, 8


def population(kind, rng, tokens=400):
    """True and estimated masses and values of tokens, float64, and attention to all else."""
    w = {
        # What is estimated is most of the mass, and right on average.
        "even": rng.lognormal(0, 0.5, tokens),
        # Few tokens are most of what the estimate lacks.
        "heavy": rng.lognormal(0, 1.5, tokens),
        # Half of the tokens are estimated five times too low.
        "biased": np.where(np.arange(tokens) % 2, 5.0, 1.0) * rng.lognormal(0, 0.2, tokens),
    }[kind]
    values = rng.normal(size=(tokens, HEAD_DIM)) + rng.normal(size=HEAD_DIM)
    groups = np.repeat(np.arange(tokens // 8), 8)
    # By clusters of eight: their geometric mean, as of exponentials of mean logits.
    mean = np.exp(np.array([np.log(w[groups == g]).mean() for g in range(tokens // 8)]))[groups]
    u = np.ones(tokens) if kind == "biased" else mean
    centres = np.array([values[groups == g].mean(0) for g in range(tokens // 8)])[groups]
    rest, other = w.sum() * rng.uniform(0.1, 3), rng.normal(size=HEAD_DIM) * 2
    return w, values, u, centres, rest, other


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize("kind", ["even", "heavy", "biased"])
def test_it_covers(kind, delta):
    rng = np.random.default_rng(3)
    covered, within = [], []
    for _ in range(20):
        w, values, u, centres, rest, other = population(kind, rng)
        exact = (rest * other + w @ values) / (rest + w.sum())
        taken = rest + u.sum()
        output = (rest * other + u @ centres) / taken
        error = np.linalg.norm(exact - output) / np.linalg.norm(exact)
        pi = 0.9 * u / u.sum() + 0.1 / len(u)
        at = rng.choice(len(u), (TRIALS // 20, 128), p=pi)
        z = w[:, None] * (values - output) - u[:, None] * (centres - output)
        found = bound_of_draws(
            jnp.asarray((z / pi[:, None] / taken)[at], jnp.float32),
            jnp.asarray(((w - u) / pi / taken)[at], jnp.float32),
            jnp.zeros((TRIALS // 20, HEAD_DIM)),
            jnp.broadcast_to(jnp.asarray(output, jnp.float32), (TRIALS // 20, HEAD_DIM)),
            delta,
        )
        covered.append(np.mean(np.asarray(found) >= error))
        within.append(np.median(np.asarray(found)) / error)
    # Of 10,000 trials three standard deviations are less than a hundredth.
    assert np.mean(covered) >= 1 - delta - 0.01
    # It says something: it is not far above the error where the estimate errs most.
    assert np.median(within) < {"even": 40, "heavy": 20, "biased": 2}[kind]


def test_more_draws_bound_more_closely():
    rng = np.random.default_rng(4)
    medians = []
    for draws in (32, 512):
        z = jnp.asarray(rng.normal(size=(500, draws, HEAD_DIM)), jnp.float32)
        a, zero = jnp.zeros((500, draws)), jnp.zeros((500, HEAD_DIM))
        output = jnp.full((500, HEAD_DIM), 5.0)
        medians.append(float(jnp.median(bound_of_draws(z, a, zero, output, 0.05))))
    assert medians[1] < medians[0] / 3


def test_an_output_that_may_be_zero_has_no_bound():
    z = jnp.asarray(np.random.default_rng(5).normal(size=(1, 64, HEAD_DIM)), jnp.float32)
    zero = jnp.zeros((1, HEAD_DIM))
    found = bound_of_draws(z, jnp.zeros((1, 64)), zero, zero + 1e-3, 0.05)
    assert np.isinf(found).all()
    # Nothing is estimated: nothing is wrong.
    found = bound_of_draws(0 * z, jnp.zeros((1, 64)), zero, zero, 0.05)
    assert (np.asarray(found) == 0).all()


@pytest.fixture(scope="module")
def drawn():
    """A state, a selection of its own, and the draws of many turns."""
    model = model_of(kv_heads=2, group=2, head_dim=HEAD_DIM)
    config = WaveConfig(
        sink_tokens=2, local_tokens=8, growth_tokens=16, segment_tokens=128, cluster_size=16,
        max_cluster_size=32, min_clusters=0, min_candidate_tokens=64, min_retrieved_tokens=16,
        tolerance=0.1, tolerance_draws=64,
    )  # fmt: skip
    attention = WaveAttention(config, "device")
    stream = random_stream(model, np.random.default_rng(6), 330, 2)
    state = attention.init_state(CacheShape.of(model), 2, 320, 10, jnp.float32)
    _, state = prefill(attention, state, stream, [320, 200])
    query, key, value = (x[:, 320:321] for x in stream)
    select = jax.jit(type(attention).select, static_argnums=0)
    selection, state = select(attention, jnp.int32(0), query, key, value, state)
    sizes = jnp.diff(state.index.offsets[0], axis=-1)
    remaining = jnp.minimum(selection.estimated, sizes)
    masses = jnp.asarray(np.random.default_rng(7).lognormal(0, 1, sizes.shape), jnp.float32)

    @jax.jit
    def turns(numbers):
        def one(turn):
            return draw_tokens(config, jnp.int32(0), masses, remaining, selection, state, turn)

        return jax.lax.map(one, numbers)

    return state, selection, masses, remaining, turns(jnp.arange(600))


def test_draws_are_as_probable_as_they_say(drawn):
    state, selection, masses, remaining, draws = drawn
    offsets, ids = np.asarray(state.index.offsets[0]), np.asarray(state.index.token_ids[0])
    held, masses = np.asarray(remaining, np.float64), np.asarray(masses, np.float64)
    for b, h in np.ndindex(held.shape[:2]):
        n, share = held[b, h], held[b, h] * masses[b, h]
        share = 0.9 * share / share.sum() + 0.1 * n / n.sum()
        clusters, rows = (np.asarray(x)[:, b, h].ravel() for x in (draws.clusters, draws.rows))
        found = np.bincount(clusters, minlength=len(share))
        expected = share * len(clusters)
        assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 1).all()
        # Of a cluster's members each as often as any other, retrieved or not.
        largest = int(np.argmax(expected))
        begin, end = offsets[b, h, largest : largest + 2]
        starts = np.arange(begin, end) // 128 * 128
        members = starts + ids[b, h, begin:end]
        often = np.array([(rows[clusters == largest] == row).sum() for row in members])
        assert often.sum() == found[largest]
        each = expected[largest] / len(members)
        assert (np.abs(often - each) < 5 * np.sqrt(each)).all()
        log_pi = np.asarray(draws.log_pi)[:, b, h].ravel()
        sizes = np.diff(offsets[b, h])
        np.testing.assert_allclose(np.exp(log_pi), (share / np.maximum(sizes, 1))[clusters], 1e-4)
        taken = np.isin(rows, np.asarray(selection.tokens)[b, h])
        remains = np.asarray(draws.remains)[:, b, h].ravel()
        assert taken.any()
        np.testing.assert_array_equal(remains, ~taken)


def test_turns_and_heads_draw_for_themselves(drawn):
    clusters = np.asarray(drawn[-1].clusters)
    assert len({clusters[turn, 0, 0].tobytes() for turn in range(50)}) == 50
    assert (clusters[0, 0, 0] != clusters[0, 0, 1]).any()
