"""The ablations of wave attention's ranking: what they leave alone, and what they change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.errors import InputError
from pallas_kernels.types import NO_ID
from tests.support.attention_harness import decode, model_of, prefill, random_stream
from wavejax import WaveAttention, WaveConfig
from wavejax.attention.wave import scale_of
from wavejax.evaluation.ablations import AblatedAttention, _corrected, quantise
from wavejax.evaluation.methods import parse_methods
from wavejax.store.shape import CacheShape

CONFIG = WaveConfig(
    segment_tokens=256,
    growth_tokens=64,
    local_tokens=16,
    cluster_size=16,
    min_clusters=0,
    min_candidate_tokens=96,
    min_retrieved_tokens=24,
)
MODEL = model_of(layers=1, kv_heads=2, group=3, head_dim=32)
LENGTHS, STEPS = [700, 300], 70


@pytest.fixture(scope="module")
def stream():
    # Twice as long queries and keys: some tokens then have far more mass than others.
    query, key, value = random_stream(
        MODEL, np.random.default_rng(5), max(LENGTHS) + STEPS, len(LENGTHS)
    )
    return 1.5 * query, 1.5 * key, value


def started(attention, stream):
    state = attention.init_state(
        CacheShape.of(MODEL), len(LENGTHS), max(LENGTHS), STEPS, jnp.float32
    )
    return prefill(attention, state, stream, LENGTHS)[1]


def outputs(attention, stream, steps=STEPS):
    state = started(attention, stream)
    return np.asarray(decode(attention, state, stream, jnp.asarray(LENGTHS), steps)[0])


def first_query(stream):
    """Of the first step after the prompts, grouped."""
    batch = jnp.arange(len(LENGTHS))
    return stream[0][batch, jnp.asarray(LENGTHS)].reshape(len(LENGTHS), 2, 3, 32)


def cluster_scores(stream, state):
    query, index = first_query(stream), state.index
    return ops.score_clusters(
        query, index.centroids, index.offsets, jnp.int32(0), scale=scale_of(query)
    )


def ranked(attention, stream):
    """What a first step ranks, and the true logits of the tokens ranked."""
    state, query = started(attention, stream), first_query(stream)
    scale = scale_of(query)
    found = attention._rank(jnp.int32(0), query, cluster_scores(stream, state), state)
    b, h = jnp.arange(len(LENGTHS))[:, None, None], jnp.arange(2)[None, :, None]
    tokens = attention._tokens(jnp.int32(0), found.positions, state)
    keys = state.store.rows.data[0, b, h, tokens, 0]
    return found, scale * np.asarray(jnp.einsum("bhgd,bhmd->bhgm", query, keys))


def test_without_settings_it_is_wave_attention(stream):
    """Past a growth, whose segment starts elsewhere."""
    expected = outputs(WaveAttention(CONFIG, "device"), stream)
    np.testing.assert_allclose(
        outputs(AblatedAttention(CONFIG, "device"), stream), expected, atol=1e-5
    )


@pytest.mark.parametrize("rotated", [True, False])
def test_wider_codes_estimate_better_and_say_how_well(stream, rotated):
    errors = []
    for bits in (1, 2, 4, 8):
        attention = AblatedAttention(CONFIG, "device", code_bits=bits, rotated=rotated)
        found, true = ranked(attention, stream)
        listed = np.broadcast_to((found.clusters != NO_ID)[:, :, None], true.shape)
        error = (np.asarray(found.estimate) - true)[listed]
        errors.append(error.std())
        said = np.sqrt(np.asarray(found.variance)[listed].mean())
        assert error.std() == pytest.approx(said, rel=0.15), bits
        assert abs(error.mean()) < 0.1 * error.std()
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.03 * errors[0]


@pytest.mark.parametrize("group_by", ["sum", "max"])
def test_the_heaviest_are_picked_for_the_group(stream, group_by):
    attention = AblatedAttention(CONFIG, "device", code_bits=8, group_by=group_by)
    found, _ = ranked(attention, stream)
    listed = np.asarray(found.clusters != NO_ID)
    estimate = np.asarray(found.estimate, np.float64)
    total = np.asarray(cluster_scores(stream, started(attention, stream)).logsumexp, np.float64)
    for b in range(2):
        for h in range(2):
            logits = estimate[b, h][:, listed[b, h]]
            # Of each head its own share: by all clusters' masses, as the ranking has it.
            shares = np.exp(logits - total[b, h][:, None])
            rank = shares.sum(0) if group_by == "sum" else shares.max(0)
            best = np.sort(np.argsort(-rank, kind="stable")[:24])
            np.testing.assert_array_equal(np.nonzero(np.asarray(found.picked)[b, h])[0], best)
    state = started(attention, stream)
    at = jnp.int32(0), first_query(stream), cluster_scores(stream, state), state
    tokens = np.asarray(attention._tokens(jnp.int32(0), found.positions, state))
    retrieved = np.asarray(attention.retrieve(*at).tokens)
    for b, h in np.ndindex(2, 2):
        np.testing.assert_array_equal(
            retrieved[b, h][retrieved[b, h] != NO_ID], tokens[b, h][np.asarray(found.picked)[b, h]]
        )


# By one bit of short queries: of exponentials of large errors no sample's mean is near the true
# one. It stays too low: what is not picked is rather what is estimated too low.
@pytest.mark.parametrize("bits, length, rtol", [(8, 1.0, 0.02), (1, 0.4, 0.2)])
def test_corrected_masses_are_true_on_average(stream, bits, length, rtol):
    """Of what candidates keep; a centroid's mass, by Jensen's inequality, is less."""
    stream = length * stream[0], *stream[1:]
    attention = AblatedAttention(CONFIG, "device", code_bits=bits)
    found, true = ranked(attention, stream)
    state = started(attention, stream)
    clusters = np.asarray(found.clusters)
    left = (clusters != NO_ID) & ~np.asarray(found.picked)
    logits = np.asarray(cluster_scores(stream, state).logits)
    corrected = np.asarray(_corrected(jnp.asarray(logits), found), np.float64)
    expected, given, before = 0.0, 0.0, 0.0
    for b, h, g in np.ndindex(*true.shape[:3]):
        own = clusters[b, h][left[b, h]]
        mass = np.exp(true[b, h, g].astype(np.float64)[left[b, h]])
        expected += mass.sum()
        given += np.exp(corrected[b, h, g, own]).sum()
        before += np.exp(logits[b, h, g, own]).sum()
        if bits == 8:
            means = [mass[own == j].mean() for j in np.unique(own)]
            np.testing.assert_allclose(np.exp(corrected[b, h, g, np.unique(own)]), means, rtol=rtol)
        others = np.setdiff1d(np.arange(logits.shape[-1]), own)
        np.testing.assert_array_equal(corrected[b, h, g, others], logits[b, h, g, others])
    assert given == pytest.approx(expected, rel=rtol)
    assert before < 0.93 * expected


def test_corrected_masses_change_the_output(stream):
    corrected = outputs(AblatedAttention(CONFIG, "device", corrected=True), stream, 3)
    assert np.abs(corrected - outputs(AblatedAttention(CONFIG, "device"), stream, 3)).max() > 1e-3


def test_quantised_numbers():
    x = jax.random.normal(jax.random.key(0), (100, 64))
    for bits in range(1, 9):
        found = np.asarray(quantise(x, bits))
        assert all(len(np.unique(row)) <= 2**bits for row in found)
        np.testing.assert_allclose(found, -np.asarray(quantise(-x, bits)), rtol=1e-6)
        assert (np.sign(found) == np.sign(x)).all()
    assert np.linalg.norm(found - x) < 0.02 * np.linalg.norm(x)
    np.testing.assert_array_equal(quantise(jnp.zeros((2, 5)), 4), 0)


def test_by_name():
    budget = {"retrieval_fraction": 0.1, "min_retrieved_tokens": 5}
    name = "ablation[code_bits=2,rotated=false,group_by=max,corrected=true,cluster_size=16]"
    found = parse_methods(f"wave,{name}", budget)[name]
    assert found == AblatedAttention(
        WaveConfig(cluster_size=16, **budget),
        "device",
        code_bits=2,
        rotated=False,
        group_by="max",
        corrected=True,
    )
    for wrong in ("code_bits=9", "group_by=mean", "token_codes=false", "rotation=true"):
        with pytest.raises(InputError):
            parse_methods(f"ablation[{wrong}]", budget)
    with pytest.raises(InputError, match="no setting 'code_bits'"):
        parse_methods("wave[code_bits=2]", budget)
