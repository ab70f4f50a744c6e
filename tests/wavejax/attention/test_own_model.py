"""A model of one's own: the attention needs a `CacheShape`, and the calls in their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention.protocol import Attention
from wavejax.store.shape import CacheShape

SHAPE, HEADS, WIDTH = CacheShape(layers=2, kv_heads=2, head_dim=16), 4, 24
PROMPTS, STEPS = (90, 5), 40
CONFIG = WaveConfig(
    local_tokens=8,
    growth_tokens=16,
    segment_tokens=32,
    cluster_size=4,
    max_cluster_size=8,
    retrieval_fraction=1.0,
)


def make_weights(rng):
    """Of each layer: projections to query, key and value, and back."""
    heads = (HEADS, SHAPE.kv_heads, SHAPE.kv_heads)
    inward = [rng.normal(size=(SHAPE.layers, WIDTH, n, SHAPE.head_dim)) / 5 for n in heads]
    outward = rng.normal(size=(SHAPE.layers, HEADS, SHAPE.head_dim, WIDTH)) / 8
    return tuple(jnp.asarray(x, jnp.float32) for x in (*inward, outward))


def apply(weights, hidden, attend):
    """`attend(layer, query, key, value)` gives a layer's output: `[batch, tokens, heads, dim]`."""
    for layer in range(SHAPE.layers):
        to_query, to_key, to_value, back = (x[layer] for x in weights)
        inputs = (jnp.einsum("btw,whd->bthd", hidden, x) for x in (to_query, to_key, to_value))
        output = attend(jnp.int32(layer), *inputs)
        hidden = hidden + jnp.einsum("bthd,hdw->btw", output, back)
    return hidden


@jax.jit
def expected_of(weights, hidden):
    """Every token's output by full causal attention, in one pass."""

    def attend(layer, query, key, value):
        key, value = (jnp.repeat(x, HEADS // SHAPE.kv_heads, axis=2) for x in (key, value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / SHAPE.head_dim**0.5
        seen = jnp.tri(hidden.shape[1], dtype=bool)
        weight = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weight, value)

    return apply(weights, hidden, attend)


def generate(attention, weights, hidden):
    """Reads the prompts and decodes the rest, as the interface's docstring says."""

    def with_state(call, state, hidden):
        def attend(*inputs):
            nonlocal state
            output, state = call(*inputs, state)
            return output

        return apply(weights, hidden, attend), state

    @jax.jit
    def read(state, hidden, sequence, length):
        def call(*inputs):
            return attention.prefill(*inputs, sequence=sequence, length=length)

        output, state = with_state(call, state, hidden)
        return output, attention.finish_prefill(state, sequence, length)

    @jax.jit
    def step(state, _):
        state = attention.grow(state)
        tokens = hidden[jnp.arange(len(PROMPTS)), attention.lengths(state)][:, None]
        output, state = with_state(attention.decode, state, tokens)
        return attention.advance(state, jnp.ones(len(PROMPTS), bool)), output[:, 0]

    state = attention.init_state(SHAPE, len(PROMPTS), max(PROMPTS), STEPS, jnp.float32)
    prompts = []
    for b, length in enumerate(PROMPTS):
        padded = hidden[b : b + 1, : max(PROMPTS)].at[:, length:].set(9.0)
        output, state = read(state, padded, jnp.int32(b), jnp.int32(length))
        prompts.append(output[0, :length])
    state, outputs = jax.lax.scan(step, state, length=STEPS)
    return prompts, outputs, state


@pytest.mark.parametrize("attention", [DenseAttention(), WaveAttention(CONFIG, "device")])
def test_an_own_model_decodes_what_full_attention_gives(attention):
    rng = np.random.default_rng(0)
    weights = make_weights(rng)
    hidden = rng.normal(size=(len(PROMPTS), max(PROMPTS) + STEPS, WIDTH))
    hidden = jnp.asarray(hidden, jnp.float32)
    expected = expected_of(weights, hidden)
    prompts, outputs, state = generate(attention, weights, hidden)
    for b, length in enumerate(PROMPTS):
        np.testing.assert_allclose(prompts[b], expected[b, :length], atol=1e-4)
        later = expected[b, length : length + STEPS]
        np.testing.assert_allclose(outputs[:, b], later, atol=1e-4)
    assert attention.lengths(state).tolist() == [length + STEPS for length in PROMPTS]
    assert isinstance(state, attention.state_type)
    if attention.has_index:
        assert state.index.tokens.tolist() == [CONFIG.indexed_tokens(90) + 2 * 16, 2 * 16]


def test_an_own_attention_names_what_it_lacks():
    class Half(Attention):
        def lengths(self, state):
            return state

    with pytest.raises(TypeError, match=r"advance.*decode.*init_state"):
        Half()


def test_full_and_wave_attention_tell_themselves_apart():
    full, wave = DenseAttention(), WaveAttention(CONFIG, "device")
    assert (full.has_index, full.has_cache, full.staged, full.cache_fraction) == (False,) * 3 + (0,)
    assert (wave.has_index, wave.has_cache, wave.staged) == (True, False, False)
    assert WaveAttention(CONFIG, fetch="staged").staged
    assert wave.cache_fraction == CONFIG.cache_fraction
    assert full.counts(full.init_state(SHAPE, 1, 8, 8, jnp.float32)) is None
    counts = wave.counts(wave.init_state(SHAPE, 1, 8, 8, jnp.float32))
    assert counts == (0, None, 0.0, 0, None, None)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"layers": 0}, "layers is 0; it must be 1 or more"),
        ({"kv_heads": -1}, "kv_heads is -1; it must be 1 or more"),
        ({"head_dim": 0}, "head_dim is 0; it must be 1 or more"),
        ({"kinds": ("full",)}, "kinds are 1; give one for each of 2 layers"),
    ],
)
def test_a_shape_s_sizes_are_checked(sizes, message):
    with pytest.raises(InputError, match=message):
        CacheShape(**{"layers": 2, "kv_heads": 2, "head_dim": 16} | sizes)


def test_a_layer_s_kind_is_full_unless_said():
    assert SHAPE.kinds == ("full", "full")
    assert CacheShape(2, 2, 16, kinds=("full", "full")) == SHAPE
    assert SHAPE.stack(3) == (2, 3, 2)
