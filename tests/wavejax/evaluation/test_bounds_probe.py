"""The probe of bounds: what it measures is the truth, and the bounds hold it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.attention_harness import model_of, prefill, random_stream
from tests.support.tiny_generator import CONFIG
from wavejax import DenseAttention, WaveAttention
from wavejax.evaluation.bounds_probe import FIGURES, BoundsProbe, BoundsState
from wavejax.evaluation.probe import wave_reads
from wavejax.store.shape import CacheShape

LENGTHS = [150, 61]


@pytest.fixture(scope="module")
def measured():
    """A step's stream, the method, its state after the step, and the figures by name."""
    model = model_of()
    stream = random_stream(model, np.random.default_rng(3), max(LENGTHS) + 1, len(LENGTHS))
    config = dataclasses.replace(CONFIG, retrieval_fraction=0.1, bounds=True, moment_rank=1)
    method, states = WaveAttention(config, "device"), []
    for attention in (DenseAttention(), method):
        room = (CacheShape.of(model), len(LENGTHS), max(LENGTHS), 8, jnp.float32)
        state = attention.init_state(*room)
        states.append(prefill(attention, state, stream, LENGTHS, room=max(LENGTHS))[1])
    full, estimated = states
    batch = jnp.arange(len(LENGTHS))
    query, key, value = (x[batch, jnp.asarray(LENGTHS)][:, None] for x in stream)
    room = jnp.zeros((1, len(LENGTHS), query.shape[2], len(FIGURES)))
    state = BoundsState(full.keys, full.values, full.tokens, estimated, room)
    decode = jax.jit(BoundsProbe.decode, static_argnums=0)
    _, state = decode(BoundsProbe(method=method), jnp.int32(0), query, key, value, state)
    [figures] = state.measured
    named = dict(zip(FIGURES, np.moveaxis(np.asarray(figures[0], np.float64), -1, 0), strict=True))
    read = np.asarray(wave_reads(method, jnp.int32(0), query, state.method, max(LENGTHS) + 1))
    return stream, read, named


@pytest.mark.slow
def test_masses_and_norms_are_those_of_float64(measured):
    stream, read, found = measured
    query, key, value = (np.asarray(x, np.float64) for x in stream)
    for b, length in enumerate(LENGTHS):
        for head in range(query.shape[2]):
            own = head // (query.shape[2] // key.shape[2])
            logits = key[b, : length + 1, own] @ query[b, length, head] / np.sqrt(key.shape[-1])
            mass, rest = np.exp(logits), ~read[b, own, : length + 1]
            output = mass @ value[b, : length + 1, own] / mass.sum()
            assert found["log_all"][b, head] == pytest.approx(np.log(mass.sum()), abs=1e-4)
            assert found["norm"][b, head] == pytest.approx(np.linalg.norm(output), rel=1e-4)
            if rest.any():
                true = np.log(mass[rest].sum())
                assert found["log_true"][b, head] == pytest.approx(true, abs=1e-4)
    # Of the long sequence some tokens are estimated.
    assert (~read[0, :, : LENGTHS[0] + 1]).any(axis=-1).all()


@pytest.mark.slow(10)
def test_the_bounds_hold_the_truth_and_the_error_is_not_nothing(measured):
    *_, found = measured
    long = {name: figures[0] for name, figures in found.items()}
    assert (long["log_low"] <= long["log_true"] + 1e-5).all()
    assert (long["log_true"] <= long["log_high"] + 1e-5).all()
    assert (long["error"] > 1e-4).all()
    assert (long["error"] <= long["error_bound"]).all()
