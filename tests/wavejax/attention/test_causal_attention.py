"""Causal attention in blocks and sections against the plain formula; when it is cuDNN's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.lowering import lower_for
from wavejax.attention import causal as module
from wavejax.attention.causal import QUERY_BLOCK, SMALLEST_BLOCK, causal_attention, query_block


def plain(query, key, value, scale):
    """Softmax over all tokens up to each one, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    logits = scale * np.einsum("qhd,khd->hqk", query, key)
    logits = np.where(np.tri(len(query), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("tokens", [1, 127, 300, 1100])
@pytest.mark.parametrize("most_logits", [module.LOGITS, 1])
def test_blocks_and_sections_give_what_the_formula_gives(monkeypatch, tokens, most_logits):
    monkeypatch.setattr(module, "LOGITS", most_logits)
    rng = np.random.default_rng(tokens)
    query, key, value = (
        jnp.asarray(rng.normal(size=(tokens, heads, 16)), jnp.float32) for heads in (4, 2, 2)
    )
    # Compiled anew: the size of a block is no argument.
    output = jax.jit(lambda *x: causal_attention(*x, scale=0.25))(query, key, value)
    np.testing.assert_allclose(output, plain(query, key, value, 0.25), atol=1e-5)


def test_a_block_of_logits_stays_below_a_gibibyte():
    assert query_block(100, 32) == 100
    assert query_block(8192, 32) == QUERY_BLOCK
    assert query_block(2**20, 32) == SMALLEST_BLOCK
    for tokens in (2**16, 100_000, 2**19):
        assert SMALLEST_BLOCK <= query_block(tokens, 32) <= QUERY_BLOCK
        assert 4 * query_block(tokens, 32) * 32 * tokens <= 2**30


class Gpu:
    def __init__(self, device_kind="NVIDIA H100", compute_capability="9.0"):
        self.device_kind, self.compute_capability = device_kind, compute_capability


def pretend(monkeypatch, backend="gpu", **gpu):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(**gpu)])
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu(**gpu)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_cudnn_is_taken_where_it_can(monkeypatch, dtype, head_dim):
    pretend(monkeypatch)
    assert module.implementation_for(dtype, head_dim) == "cudnn"
    assert module.implementation_for(jnp.float32, head_dim) == "blocks"
    assert module.implementation_for(dtype, head_dim + 4) == "blocks"
    assert module.implementation_for(dtype, 256) == "blocks"


@pytest.mark.parametrize(
    "where",
    [
        {"backend": "cpu"},
        {"backend": "tpu"},
        {"device_kind": "AMD Instinct MI300X", "compute_capability": "gfx942"},
        {"compute_capability": "7.5"},
    ],
)
def test_cudnn_is_not_taken_elsewhere(monkeypatch, where):
    pretend(monkeypatch, **where)
    assert module.implementation_for(jnp.bfloat16, 128) == "blocks"


@pytest.mark.parametrize("choice", ["cudnn", "blocks"])
def test_the_choice_is_what_is_lowered(monkeypatch, choice):
    """For CUDA without a GPU: JAX only wants a number for the version of cuDNN that is not there.

    Whether cuDNN takes the program shows on a GPU: `tests/gpu/test_dense_on_gpu.py`.
    """
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    monkeypatch.setattr(module, "implementation_for", lambda dtype, head_dim: choice)
    query, key, value = (
        jax.ShapeDtypeStruct((1000, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)
    )
    text = lower_for("cuda", lambda *x: causal_attention(*x, scale=0.1), query, key, value)
    assert ("cudnn$fmha" in text) == (choice == "cudnn")
    assert ("CAUSAL" in text) == (choice == "cudnn")
