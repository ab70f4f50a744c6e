"""Full attention on a CUDA GPU: the kernel of `attend_dense`, and cuDNN over a whole prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.config import ModelConfig
from pallas_kernels.attend_dense import triton as attend_dense
from tests.support.gpu_cases import LAYER, SEED, assert_close, run_twice, shape
from wavejax import DenseAttention
from wavejax.attention import causal
from wavejax.store.shape import CacheShape

pytestmark = pytest.mark.gpu

# Every head dim, group size and dtype, not all of their combinations.
CASES = (
    shape("llama"),
    shape("llama", dtype="float32"),
    shape("qwen", dtype="float16"),
    shape("smollm2", dtype="float32"),
    shape("gemma"),
    shape("gemma", dtype="float32"),
    shape("phi"),
)


def make_case(case, tokens=5000, layers=2):
    """Query, caches poisoned past each sequence's length, and lengths: 0, 1, some, all."""
    keys = jax.random.split(jax.random.key(SEED), 3)
    batch, dtype = 4, jnp.dtype(case.dtype)
    cache = (layers, batch, case.kv_heads, tokens, case.head_dim)
    lengths = jnp.array([0, 1, tokens - 1777, tokens], jnp.int32)
    seen = (jnp.arange(tokens) < lengths[:, None])[None, :, None, :, None]
    key, value = (
        ops.Rows(jnp.where(seen, jax.random.normal(k, cache), jnp.nan).astype(dtype))
        for k in keys[:2]
    )
    heads = (batch, case.kv_heads, case.group, case.head_dim)
    return jax.random.normal(keys[2], heads).astype(dtype), key, value, lengths


@pytest.mark.parametrize("splits", [None, 1, 37])
@pytest.mark.parametrize("case", CASES, ids=lambda s: f"{s.name}-{s.dtype}")
def test_attend_dense(case, splits):
    query, keys, values, lengths = make_case(case)
    config = None
    if splits is not None:
        config = attend_dense.heuristic(32, 5000, case.head_dim, query.dtype.itemsize)
        config = dataclasses.replace(config, splits=splits)
    found = run_twice(
        lambda *a: attend_dense.attend_dense(*a, LAYER, scale=case.scale, config=config),
        *(query, keys, values, lengths),
    )
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), (query, keys, values))
    plain = jax.jit(lambda *a: ops.attend_dense(*a, LAYER, scale=case.scale, implementation="xla"))
    output, logsumexp = plain(*floats, lengths)
    np.testing.assert_array_equal(found[0][0], 0)
    assert_close(found[0], output, case.dtype, "output")
    assert_close(found[1], logsumexp, case.dtype, "logsumexp")


def test_a_step_copies_no_cache():
    """All layers of a decode step in one program, in place on a donated state."""
    model = ModelConfig("llama", 100, 3, 256, 256, 8, 2, 128, 10_000)
    attention = DenseAttention()
    state = attention.init_state(CacheShape.of(model), 2, 4096, 64, jnp.bfloat16)

    def step(query, key, value, state):
        for layer in range(model.num_layers):
            query, state = attention.decode(jnp.int32(layer), query, key, value, state)
        return query, attention.advance(state, jnp.ones(2, bool))

    arrays = [jnp.ones((2, 1, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    compiled = jax.jit(step, donate_argnums=3).lower(*arrays, state).compile()
    assert "attend_dense" in compiled.as_text()
    cache = state.keys.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
    place = state.keys.unsafe_buffer_pointer()
    _, state = compiled(*arrays, state)
    assert state.keys.unsafe_buffer_pointer() == place


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens, head_dim", [(128, 64), (1300, 96), (4096, 128), (999, 128)])
def test_cudnn_gives_what_blocks_give(tokens, head_dim, dtype):
    assert causal.implementation_for(dtype, head_dim) == "cudnn"
    keys = jax.random.split(jax.random.key(SEED), 3)
    query, key, value = (
        jax.random.normal(k, (tokens, heads, head_dim)).astype(dtype)
        for k, heads in zip(keys, (8, 2, 2), strict=True)
    )
    found = run_twice(lambda *x: causal.causal_attention(*x, scale=0.2), query, key, value)
    floats = (x.astype(jnp.float32) for x in (query, key, value))
    expected = jax.jit(lambda *x: causal.by_blocks(*x, scale=0.2))(*floats)
    assert_close(found, expected, dtype, "output")
