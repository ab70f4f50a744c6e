"""`compare_admission.py`: what it counts, on a small model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.scripts import load_script
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, WaveAttention, WaveConfig
from wavejax.engine.prompts import bucket


@pytest.fixture(scope="module")
def script():
    return load_script("compare_admission")


def test_the_settings_are_named(script):
    found = script.settings([0.036, 0.0], [1.0, 16.0])
    assert list(found) == [
        "paper", "3.6 %, ratio 1", "3.6 %, ratio 16", "default, ratio 1", "default, ratio 16"
    ]  # fmt: skip
    assert found["paper"] == WaveConfig.paper()
    assert found["default, ratio 16"] == WaveConfig(admission_ratio=16.0)
    assert found["3.6 %, ratio 1"].min_retrieved_tokens == 0


@pytest.mark.slow
def test_the_larger_the_ratio_the_fewer_rows_are_missed(script):
    [prompt], new = make_prompts((318,)), 40
    full = Generator(MODEL, DenseAttention(), GREEDY)
    state = full.start(make_params(), [prompt], new)
    answer = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (new, 1)))
    _, expected = full.force(make_params(), jax.tree.map(jnp.copy, state), answer)
    found = []
    for ratio in (1.0, 1.5, 1e9):
        config = dataclasses.replace(CONFIG, admission_ratio=ratio)
        generator = Generator(MODEL, WaveAttention(config, "host"), GREEDY)
        own = script.start(state, generator, bucket(len(prompt)), new, slots=20)
        found.append(script.measure(generator, make_params(), own, answer, expected, warm_up=10))
    plain, some, none = found
    assert {one["slots"] for one in found} == {20}
    # At a ratio of 1 what is retrieved is the budget.
    assert plain["hit"] + plain["missed"] >= config.min_retrieved_tokens
    assert plain["missed"] > some["missed"] > none["missed"] == 0
    assert plain["kl_while_filling"] > 0
    assert none["kl"] > plain["kl"]
