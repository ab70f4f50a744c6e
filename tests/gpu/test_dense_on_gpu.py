"""Full attention on a CUDA GPU: the kernel of `attend_dense`, and cuDNN over a whole prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from models.config import ModelConfig
from pallas_kernels.attend_dense import triton as attend_dense
from pallas_kernels.rounding import dequantise, quantise
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


def check(case, splits, given, numbers):
    """Compare the kernel on what is given with plain JAX on the numbers, in float32."""
    config = None
    if splits is not None:
        config = attend_dense.heuristic(32, 5000, case.head_dim, given[0].dtype.itemsize)
        config = dataclasses.replace(config, splits=splits)
    found = run_twice(
        lambda *a: attend_dense.attend_dense(*a, LAYER, scale=case.scale, config=config), *given
    )
    plain = jax.jit(lambda *a: ops.attend_dense(*a, LAYER, scale=case.scale, implementation="xla"))
    output, logsumexp = plain(*numbers, given[-1])
    np.testing.assert_array_equal(found[0][0], 0)
    assert_close(found[0], output, case.dtype, "output")
    assert_close(found[1], logsumexp, case.dtype, "logsumexp")


@pytest.mark.parametrize("splits", [None, 1, 37])
@pytest.mark.parametrize("case", CASES, ids=lambda s: f"{s.name}-{s.dtype}")
def test_attend_dense(case, splits):
    *arrays, lengths = make_case(case)
    numbers = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    check(case, splits, (*arrays, lengths), numbers)


@pytest.mark.parametrize("splits", [None, 1, 37])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.dtype != "float16"], ids=lambda s: f"{s.name}-{s.dtype}"
)
def test_attend_dense_of_levels(case, splits):
    """Keys and values in int8: the kernel folds scales in, and reads none past the lengths."""
    query, *rows, lengths = make_case(case)
    unseen = (jnp.arange(rows[0].shape[3]) >= lengths[:, None])[None, :, None, :]

    def rounded(rows):
        levels, scales = quantise(rows.data)
        return ops.Rows(jnp.where(unseen[..., None], 127, levels), scales)

    keys, values = jax.jit(lambda rows: [rounded(each) for each in rows])(rows)
    assert bool(jnp.isnan(keys.scales).any())
    numbers = [query.astype(jnp.float32), *(ops.Rows(dequantise(x)) for x in (keys, values))]
    check(case, splits, (query, keys, values, lengths), numbers)


@pytest.mark.parametrize("row_dtype", ["model", "int8"])
def test_a_step_copies_no_cache(row_dtype):
    """All layers of a decode step in one program, in place on a donated state."""
    model = ModelConfig("llama", 100, 3, 256, 256, 8, 2, 128, 10_000)
    attention = DenseAttention(row_dtype=row_dtype)
    state = attention.init_state(CacheShape.of(model), 2, 4096, 64, jnp.bfloat16)

    def step(query, key, value, state):
        for layer in range(model.num_layers):
            query, state = attention.decode(jnp.int32(layer), query, key, value, state)
        return query, attention.advance(state, jnp.ones(2, bool))

    arrays = [jnp.ones((2, 1, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    compiled = jax.jit(step, donate_argnums=3).lower(*arrays, state).compile()
    assert "attend_dense" in compiled.as_text()
    cache = state.keys.data.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 4
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    _, state = compiled(*arrays, state)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)] == places


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
