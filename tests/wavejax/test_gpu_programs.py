"""A decode step and a prefill as programs for a CUDA GPU, lowered without one."""

import re

import jax.numpy as jnp
import pytest

from pallas_kernels import _dispatch
from tests.pallas_kernels.lowering import lower_for
from tests.wavejax.attention_harness import model_of
from wavejax import DenseAttention, WaveAttention

STEP = {
    *("score_clusters", "rank_clusters", "list_clusters", "score_tokens", "estimate_threshold"),
    *("list_contenders", "select_rows", "attend_zones", "merge_states"),
}
INDEX = {"assign_tokens", "move_centroids", "cut_clusters", "sum_pieces", "encode_tokens"}


@pytest.mark.parametrize("store", ["device", "host"])
def test_all_the_work_is_kernels(store, monkeypatch):
    """Both stores: the kernels take one in host memory as it is. Growth is part of the step."""
    monkeypatch.setattr(_dispatch, "call", by_kernels)
    attention = WaveAttention(store=store)
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    state = attention.init_state(model, 2, 2500, 100, jnp.bfloat16)

    def arrays(batch, tokens):
        return [jnp.zeros((batch, tokens, heads, 64), jnp.bfloat16) for heads in (6, 2, 2)]

    def step(query, key, value, state):
        state = attention.grow(state)
        output, state = attention.decode(jnp.int32(1), query, key, value, state)
        return output, attention.advance(state, jnp.ones(2, bool))

    def prefill(query, key, value, state):
        at = {"sequence": jnp.int32(0), "length": jnp.int32(2400)}
        return attention.prefill(jnp.int32(1), query, key, value, state, **at)

    # XLA writes to a store on the device by itself.
    append = {"append_rows"} if store == "host" else set()
    steps = kernels_of(lower_for("cuda", step, *arrays(2, 1), state))
    assert steps >= STEP | INDEX | append
    prefills = kernels_of(lower_for("cuda", prefill, *arrays(1, 2500), state))
    assert prefills >= INDEX | append
    assert {"append_rows"} & (steps | prefills) == append


def test_full_attention_reads_its_cache_in_kernels_only(monkeypatch):
    monkeypatch.setattr(_dispatch, "call", by_kernels)
    attention = DenseAttention()
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    state = attention.init_state(model, 2, 2500, 100, jnp.bfloat16)
    query, key, value = (jnp.zeros((2, 1, heads, 64), jnp.bfloat16) for heads in (6, 2, 2))
    text = lower_for("cuda", attention.decode, jnp.int32(1), query, key, value, state)
    assert kernels_of(text) == {"attend_dense", "merge_states"}
    # A custom call's operand that is a slice would be a copy.
    assert "slice" not in text
    assert "gather" not in text


def by_kernels(op, implementation, implementations, *args, **kwargs):
    picked = implementation or ("triton" if "triton" in implementations else "xla")
    return implementations[picked](*args, **kwargs)


def kernels_of(text):
    assert "callback" not in text
    return set(re.findall(r'name = "([a-z_]+)"', text))
