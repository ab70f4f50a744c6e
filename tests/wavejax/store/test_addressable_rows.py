"""Rows of one byte a number never end where a kernel's pointers do not reach."""

import math

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from pallas_kernels.toolbox.launch import check_addressable
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.state_shapes import state_shapes
from wavejax.planning.memory import footprint
from wavejax.store.rows import addressable
from wavejax.store.shape import CacheShape

LLAMA = CacheShape(layers=32, kv_heads=8, head_dim=128)
ATTENTIONS = {
    "full": DenseAttention(row_dtype="int8"),
    "device": WaveAttention(WaveConfig(row_dtype="int8"), "device"),
    "host": WaveAttention(WaveConfig(row_dtype="int8"), "host", "in_place"),
}


@pytest.mark.parametrize("tokens", [32_768, 32_769, 49_152, 65_536, 65_537])
def test_room_is_as_asked_or_past_four_gib(tokens):
    shape = (32, 1, 8, tokens, 2, 128)
    found = addressable(shape, jnp.int8)
    check_addressable("rows", jax.ShapeDtypeStruct(found, jnp.int8))
    if tokens in (32_768, 65_537):
        assert found == shape
    else:
        assert math.prod(found) > 2**32 >= math.prod(found) - math.prod(found) // found[3]
    assert addressable(shape, jnp.bfloat16) == shape


@pytest.mark.parametrize("name", ATTENTIONS)
def test_states_are_in_reach_and_plans_count_them(name):
    attention, dtype = ATTENTIONS[name], jnp.dtype("bfloat16")
    for tokens in (30_720, 40_960, 57_344, 98_304, 122_880):
        state = state_shapes(attention, LLAMA, 1, tokens, 1024, dtype, 1)
        check_addressable("state", state)
        plain = state_shapes(type(attention)(), LLAMA, 1, tokens, 1024, dtype, 1)
        grown = sum(x.size for x in jax.tree.leaves(state)) / sum(
            x.size for x in jax.tree.leaves(plain)
        )
        assert 0.8 < grown < 2.2


def test_a_plan_counts_the_room():
    model = ModelConfig(
        "llama", vocab_size=128_256, num_layers=32, hidden_size=4096, intermediate_size=14_336,
        num_heads=32, num_kv_heads=8, head_dim=128, max_context=131_072,
    )  # fmt: skip
    need = [
        footprint(model, DenseAttention(row_dtype="int8"), 1, tokens, 1024, "bfloat16").rows
        for tokens in (57_344, 81_920, 131_072)
    ]
    assert need[0] == 2 * 32 * 8 * 128 * (57_344 + 1024)
    assert 2 * 2**32 < need[1] < 2.01 * 2**32
    assert need[2] == 2 * 32 * 8 * 128 * (131_072 + 1024)
