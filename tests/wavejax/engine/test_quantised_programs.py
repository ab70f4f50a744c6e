"""Loops of steps keep quantised weights as they are: XLA converts none before the loop."""

import re

import jax
import jax.numpy as jnp
import pytest

from models import quantised
from models.config import ModelConfig
from models.decoder import Decoder
from models.unstacked import unstack_layers
from tests.support.quantised_cases import quantised_params
from wavejax import DecodeState, DenseAttention, Generator
from wavejax.engine import compiled
from wavejax.store.shape import CacheShape

# It looks at a compiled program.
pytestmark = pytest.mark.optimised

WIDE = ModelConfig("llama", 50, 2, 64, 160, 4, 2, 16, 10**4)


def carried(weight_dtype):
    """Count matrices of gate and up that a loop of decode steps holds: as levels, and as floats.

    Layers are apart, and written out, as on a GPU; a layer's gate and up are one matrix.
    """
    attention, ids = DenseAttention(), jnp.zeros((1, 1), jnp.int32)
    decoder = Decoder(WIDE, lambda layer, query, key, value, state: (query, state))
    floats = decoder.init(jax.random.key(0), ids, ids, None)
    params = unstack_layers(quantised_params(WIDE, floats, weight_dtype))
    cache = attention.init_state(CacheShape.of(WIDE), 1, 64, 16, jnp.float32)
    logits = jnp.zeros((1, WIDE.vocab_size))
    state = DecodeState(cache, logits, jnp.zeros(1, bool), jnp.int32(0), jnp.int32(0))
    engine = Generator(WIDE, attention, unroll=True).engine
    compiled.decode_n.clear_cache()
    text = compiled.decode_n.lower(engine, params, state, jnp.int32(8), 8).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    levels, floats = r"[su]8\[320,(?:64|32)\]", r"f32\[320,(?:64|2,32|2,2,16)\]"
    return [sum(len(re.findall(kind, line)) for line in loops) for kind in (levels, floats)]


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_a_loop_of_steps_keeps_no_floats(weight_dtype, monkeypatch):
    """Conversions do not depend on the step: without the barrier XLA makes them before the loop."""
    levels, floats = carried(weight_dtype)
    assert (levels, floats) == (WIDE.num_layers, 0)
    monkeypatch.setattr(quantised.lax, "optimization_barrier", lambda operands: operands)
    assert carried(weight_dtype)[1] >= WIDE.num_layers
