"""Continuous batching on a GPU: kernels work on parked slots; cuDNN attends block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.batch_requests import SAMPLERS, Alone, make_engine, make_request
from tests.support.tiny_generator import CONFIG
from tests.wavejax.engine.batching.test_batch_engine import InParts, arrivals, check
from wavejax import WaveAttention
from wavejax.attention.causal import causal_attention
from wavejax.attention.causal_block import attend_block, block_tokens
from wavejax.engine.batching import Room

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("store", ["device", "host"])
def test_requests_that_join_and_leave_get_what_they_get_alone(store, in_parts):
    attention, rng = WaveAttention(CONFIG, store), np.random.default_rng(2)
    engine = make_engine(attention, [Room(320, 128, 3)], max_stall_ms=1e-3, queue_limit=99)
    requests = [make_request(rng, (262, 318, 5), SAMPLERS[:2], most=90) for _ in range(12)]
    if in_parts:
        with InParts():
            handles = arrivals(engine, rng, requests)
    else:
        handles = arrivals(engine, rng, requests)
    assert "length" in check(handles, Alone(attention, most=90))


@pytest.mark.parametrize("tokens, length", [(8192, 8000), (10240, 10240), (2048, 100)])
def test_blocks_by_cudnn_give_what_the_whole_prompt_gives(tokens, length):
    """In bfloat16, within its rounding; past the prompt's length there is anything."""
    keys = jax.random.split(jax.random.key(tokens), 3)
    shapes = ((tokens, 32, 128), (tokens, 8, 128), (tokens, 8, 128))
    query, key, value = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )
    block = block_tokens(tokens, 32, jnp.bfloat16, 128)
    assert block == 2048
    whole = causal_attention(query, key, value, scale=128**-0.5)
    attend = jax.jit(functools.partial(attend_block, scale=128**-0.5))
    heads_first = [jnp.swapaxes(x, 0, 1) for x in (key, value)]
    parts = [
        attend(query[number * block : (number + 1) * block], *heads_first, jnp.int32(number))
        for number in range(tokens // block)
    ]
    found = jnp.concatenate(parts)[:length].astype(jnp.float32)
    np.testing.assert_allclose(found, whole[:length].astype(jnp.float32), atol=0.02)
