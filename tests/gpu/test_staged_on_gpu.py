"""`fetch="staged"` on a CUDA GPU: the tokens that kernels reading host memory in place give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import Decoder
from tests.gpu.test_engine_on_gpu import CONFIG, LLAMA
from wavejax import Generator, WaveAttention

pytestmark = [pytest.mark.gpu, pytest.mark.slow(120)]


@pytest.mark.parametrize("row_dtype", ["model", "int8"])
def test_both_ways_of_fetching_say_the_same(row_dtype):
    """In float32, token for token: a ragged batch, past a growth."""
    ids = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(LLAMA, lambda layer, q, k, v, state: (q, state)).init(
        jax.random.key(0), ids, ids, None
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, LLAMA.vocab_size, length).tolist() for length in (3000, 1200, 40)]
    config = dataclasses.replace(CONFIG, row_dtype=row_dtype)
    tokens, facts = [], []
    for fetch in ("in_place", "staged"):
        generator = Generator(LLAMA, WaveAttention(config, fetch=fetch))
        state = generator.start(params, prompts, 150)
        state, found = generator.decode_n(params, state, 150)
        tokens.append(np.asarray(found))
        facts.append(generator.facts(state))
    np.testing.assert_array_equal(tokens[0], tokens[1])
    in_place, staged = facts
    assert staged.host_bytes == in_place.host_bytes > 0
    assert staged.device_bytes == in_place.device_bytes
    # Rounding may retrieve another row now and then.
    assert staged.hit_ratio == pytest.approx(in_place.hit_ratio, abs=1e-3)
    assert 0 < staged.hit_ratio < 1
