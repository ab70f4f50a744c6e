"""A decode step and a prefill as programs for a CUDA GPU, lowered without one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from models.parameters import nest, parameter_shapes
from pallas_kernels import dispatch
from tests.support.attention_harness import model_of
from tests.support.layer_programs import by_kernels, layer_programs
from tests.support.lowering import lower_for
from wavejax import DenseAttention, WaveAttention
from wavejax.engine import staged_programs
from wavejax.store.shape import CacheShape

STEP = {
    *("score_clusters", "rank_clusters", "list_clusters", "score_tokens", "estimate_threshold"),
    *("list_contenders", "pick_rows", "look_up_rows", "attend_zones", "merge_states"),
}
INDEX = {"assign_tokens", "move_centroids", "cut_clusters", "average_pieces", "encode_tokens"}


@pytest.mark.parametrize("store", ["device", "host"])
def test_all_the_work_is_kernels(store, monkeypatch):
    """Both stores: the kernels take one in host memory as it is. Growth is part of the step."""
    monkeypatch.setattr(dispatch, "call", by_kernels)
    attention = WaveAttention(store=store)
    programs = layer_programs(attention, 2500)

    # XLA writes to a store on the device by itself, and rows there need no slots.
    append = {"append_rows"} if store == "host" else set()
    admit = {"admit_rows"} if store == "host" else set()
    steps, prefills = (
        kernels_of(lower_for("cuda", function, *operands))
        for function, operands in programs.values()
    )
    assert steps >= STEP | INDEX | append | admit
    assert {"admit_rows"} & steps == admit
    assert prefills >= INDEX | append
    assert {"append_rows"} & (steps | prefills) == append


@pytest.mark.parametrize("row_dtype", ["model", "int8"])
def test_full_attention_reads_its_cache_in_kernels_only(row_dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "call", by_kernels)
    attention = DenseAttention(row_dtype=row_dtype)
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    state = attention.init_state(CacheShape.of(model), 2, 2500, 100, jnp.bfloat16)
    query, key, value = (jnp.zeros((2, 1, heads, 64), jnp.bfloat16) for heads in (6, 2, 2))
    text = lower_for("cuda", attention.decode, jnp.int32(1), query, key, value, state)
    assert kernels_of(text) == {"attend_dense", "merge_states"}
    # A custom call's operand that is a slice would be a copy.
    assert "slice" not in text
    assert "gather" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_staged_rows_are_arguments_of_programs_that_know_no_host_memory(platform, monkeypatch):
    """The programs between which Python brings a layer's missed rows: on a GPU still of kernels."""
    if platform == "cuda":
        monkeypatch.setattr(dispatch, "call", by_kernels)
    model = model_of(layers=2, kv_heads=2, group=3, head_dim=64)
    attention = WaveAttention(fetch="staged")
    state = attention.init_state(CacheShape.of(model), 2, 2500, 100, jnp.bfloat16)
    shapes = parameter_shapes(model)
    params = nest({at: jnp.zeros(shape, jnp.bfloat16) for at, shape in shapes.items()})
    params, layer = {"params": params}, jnp.int32(1)
    hidden = jnp.zeros((2, 1, model.hidden_size), jnp.bfloat16)
    block = jnp.zeros((2, 2, 16, 2, 64), jnp.bfloat16)
    # Unwrapped, since JAX would keep what is traced here for other platforms too.
    select = functools.partial(staged_programs.select.__wrapped__, model, attention)
    attend = functools.partial(staged_programs.attend.__wrapped__, attention)
    finish = functools.partial(staged_programs.finish.__wrapped__, model, attention)

    inputs = params, layer, hidden, jnp.zeros((2, 1), jnp.int32), state
    selection, tokens, slots, _ = jax.eval_shape(select, *inputs)
    zones, _ = jax.eval_shape(attend, layer, selection, state)
    rest = params, layer, hidden, selection.query, zones, tokens, slots, block, state
    lowered = (
        lower_for(platform, select, *inputs),
        lower_for(platform, attend, layer, selection, state),
        lower_for(platform, finish, *rest),
    )
    kernels = [kernels_of(text) for text in lowered]
    assert not any("pinned_host" in text for text in lowered)
    if platform == "cuda":
        assert kernels[0] >= STEP - {"attend_zones", "merge_states"}
        assert kernels[1:] == [{"attend_zones"}, {"merge_states"}]
    else:
        assert kernels == [set()] * 3


def kernels_of(text):
    assert "callback" not in text
    return set(re.findall(r'name = "([a-z_]+)"', text))
