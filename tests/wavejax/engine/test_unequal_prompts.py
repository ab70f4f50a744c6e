"""Prompts of 200 to 8,000 tokens in one batch: each answer is the one that the prompt gets alone.

Their clusters differ in size: of 8 tokens up to 6,144 indexed ones, of 16 for the longest here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import Decoder
from tests.support.tiny_generator import GREEDY, MODEL, SAMPLED, make_prompts
from wavejax import Generator, WaveAttention, WaveConfig
from wavejax.engine.sampling import settings_of
from wavejax.engine.state import commit

# One layer of a single kv head, and few clusters: by default they grow from 49,152 tokens on.
SMALL = dataclasses.replace(MODEL, num_layers=1, num_heads=2, num_kv_heads=1)
CONFIG = WaveConfig(
    growth_tokens=16,
    min_clusters=384,
    min_candidate_tokens=512,
    min_retrieved_tokens=32,
    cache_fraction=0.01,
)
LENGTHS, NEW = (200, 1000, 3000, 8000), 24


def read_once(attention, params, prompts, sequences):
    """Greedy and sampled answers `[2, steps, batch]` of prompts that are read once for both."""
    generator = Generator(SMALL, attention, GREEDY)
    state = generator.start(params, prompts, NEW, seed=7, sequences=sequences)
    answers = []
    for sampler in (GREEDY, SAMPLED):
        # The state is donated, so each sampler gets a copy, with settings of its own.
        own = jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), state)
        settings = settings_of([sampler] * len(prompts), SMALL.vocab_size, [sampler])
        own = dataclasses.replace(own, sampling=commit(settings))
        answers.append(
            dataclasses.replace(generator, sampler=sampler).decode_n(params, own, NEW)[1]
        )
    return np.asarray(answers), state


@pytest.mark.slow(120)
@pytest.mark.parametrize("store", ["device", "host"])
def test_each_gets_the_answer_that_it_gets_alone(store):
    params = Decoder(SMALL, lambda layer, query, key, value, state: (query, state)).init(
        jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), None
    )
    attention, prompts = WaveAttention(CONFIG, store), make_prompts(LENGTHS)
    together, state = read_once(attention, params, prompts, None)
    index = state.attention_state.index
    sizes = np.asarray(index.tokens) / np.asarray(index.num_clusters)[0, :, 0]
    assert sizes[1] < 10 < sizes[3]  # clusters of two sizes are in the batch
    assert (together[0] != together[1]).any()
    for sequence, prompt in enumerate(prompts):
        alone, _ = read_once(attention, params, [prompt], [sequence])
        np.testing.assert_array_equal(together[..., sequence], alone[..., 0], err_msg=str(sequence))
