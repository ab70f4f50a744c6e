"""One prefill for all methods: each gets the state that it would make itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.tiny_generator import CONFIG, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention
from wavejax.engine.prompts import bucket
from wavejax.evaluation import shared_prefill
from wavejax.evaluation.methods import parse_methods
from wavejax.evaluation.shared_prefill import SharedPrefill


@pytest.mark.parametrize("name", ["full", "full[row_dtype=int8]", "quest", "wave_no_estimation"])
def test_a_shared_prefill_is_the_methods_own(name):
    budget = {"retrieval_fraction": 0.1, "min_retrieved_tokens": 4, "min_candidate_tokens": 16} | {
        field: getattr(CONFIG, field)
        for field in ("local_tokens", "growth_tokens", "segment_tokens", "cluster_size")
    }
    attention = parse_methods(name, budget)[name]
    params, prompts = make_params(), make_prompts([200, 90])
    generator = Generator(MODEL, attention)
    steps, room = 24, bucket(200)
    expected = generator.decode_n(params, generator.start(params, prompts, steps), steps)[1]
    full = Generator(MODEL, DenseAttention())
    shared = SharedPrefill(full.start(params, prompts, steps), room, steps)
    for _ in range(2):  # A state may be donated: the next one is another's.
        found = generator.decode_n(params, shared.state(generator), steps)[1]
        np.testing.assert_array_equal(found, expected)


def test_an_index_is_built_once_for_methods_that_can_share_it(monkeypatch):
    built = []
    monkeypatch.setattr(
        shared_prefill, "build_index", lambda builder, *_: built.append(builder) or jnp.zeros(1)
    )
    full = Generator(MODEL, DenseAttention())
    shared = SharedPrefill(full.start(make_params(), make_prompts([200]), 8), 256, 8)
    changes = (
        {},
        {"retrieval_fraction": 0.5},
        {"estimation_fraction": 0.0, "min_retrieved_tokens": 0, "candidate_fraction": 0.5},
        {"min_candidate_tokens": 0},
        {"cluster_size": 4},
        {"cluster_size": 4, "retrieval_fraction": 0.5},
        {"token_codes": False},
    )
    for changed in changes:
        config = dataclasses.replace(CONFIG, **changed)
        shared.state(Generator(MODEL, WaveAttention(config, "device")))
    assert [(one.config.cluster_size, one.config.token_codes) for one in built] == [
        (8, True),
        (4, True),
        (8, False),
    ]


@pytest.mark.parametrize("least", [0, 16])
def test_a_shared_prefill_has_the_row_cache_that_the_method_has(least):
    """Traces of which rows are retrieved are read from its slots, and its size decides what is."""
    params, prompts = make_params(), make_prompts([200])
    full = Generator(MODEL, DenseAttention())
    shared = SharedPrefill(full.start(params, prompts, 8), bucket(200), 8)
    config = dataclasses.replace(CONFIG, min_retrieved_tokens=least)
    for cached in (True, False):
        generator = Generator(MODEL, WaveAttention(config, store="device", cached=cached))
        found, expected = (
            state.attention_state.cache.table.token_of_slot.shape[-1]
            for state in (shared.state(generator), generator.start(params, prompts, 8))
        )
        assert found == expected
        assert (found > 0) == cached
