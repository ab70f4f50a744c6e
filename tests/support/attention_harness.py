"""Runs an attention on given queries, keys and values, without a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig


def model_of(layers=1, kv_heads=2, group=2, head_dim=16) -> ModelConfig:
    """A model's sizes, as far as attention looks at them."""
    return ModelConfig(
        architecture="llama",
        vocab_size=11,
        num_layers=layers,
        hidden_size=8,
        intermediate_size=8,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=100_000,
        rope_theta=1e4,
        norm_eps=1e-5,
    )


def random_stream(model, rng, tokens, batch):
    """Queries, keys and values `[batch, tokens, heads, head_dim]`, float32."""

    def random(heads):
        shape = (batch, tokens, heads, model.head_dim)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return random(model.num_heads), random(model.num_kv_heads), random(model.num_kv_heads)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(attention, layer, query, key, value, state, sequence, length):
    return attention.prefill(layer, query, key, value, state, sequence=sequence, length=length)


def prefill(attention, state, stream, lengths, layer=0, room=None):
    """Reads each sequence's first `lengths[b]` tokens; returns the outputs there and the state."""
    # Committed, as what a compiled call returns is: otherwise each program compiles twice.
    state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
    room = room or max(lengths)
    outputs = []
    for b, length in enumerate(lengths):
        # Padding that must not matter.
        query, key, value = (
            jnp.pad(
                x[b : b + 1, :length],
                ((0, 0), (0, room - length), (0, 0), (0, 0)),
                constant_values=3.0,
            )
            for x in stream
        )
        where = jnp.int32(b), jnp.int32(length)
        output, state = _prefill(attention, jnp.int32(layer), query, key, value, state, *where)
        outputs.append(np.asarray(output[0, :length]))
        state = attention.finish_prefill(state, *where)
    return outputs, state


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=1)
def decode(attention, state, stream, start, steps):
    """Decodes tokens start[b] .. start[b] + steps of each sequence, in layer 0.

    Returns the outputs `[steps, batch, heads, head_dim]` and the state.
    """
    batch = jnp.arange(start.shape[0])

    def step(state, i):
        query, key, value = (x[batch, start + i][:, None] for x in stream)
        state = attention.grow(state)
        output, state = attention.decode(jnp.int32(0), query, key, value, state)
        state = attention.advance(state, jnp.ones(start.shape[0], bool))
        return state, output[:, 0]

    state, outputs = jax.lax.scan(step, state, jnp.arange(steps))
    return outputs, state
