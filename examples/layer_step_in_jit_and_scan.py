"""Run one layer's decode step inside a `jit` and a `scan` of your own.

Shows that a state is a pytree and the methods of an attention are pure functions of it: one
compiled program reads a prompt's keys and values, a second one scans over 32 decode steps. Queries,
keys and values are random: there is no model. The index grows on the way, inside the scan.
Takes about 15 s on two CPU cores.

    python examples/layer_step_in_jit_and_scan.py
"""

import functools

import jax
import jax.numpy as jnp

from wavejax import CacheShape, WaveAttention, WaveConfig

HEADS, KV_HEADS, HEAD_DIM, PROMPT, STEPS = 4, 2, 32, 300, 32
# `init_state` reads the numbers of layers (one), kv heads and dimensions of this, and no more.
SHAPES = CacheShape(layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
ATTENTION = WaveAttention(
    # Small zones, so that so short a text has an index: 16 tokens are retrieved in a step.
    WaveConfig(
        local_tokens=8,
        growth_tokens=16,
        segment_tokens=128,
        cluster_size=8,
        max_cluster_size=16,
        min_retrieved_tokens=16,
    ),
    store="device",
)
LAYER, SEQUENCE = jnp.int32(0), jnp.int32(0)


def random_tokens(key, tokens):
    """Query `[1, tokens, HEADS, HEAD_DIM]`, key and value `[1, tokens, KV_HEADS, HEAD_DIM]`."""
    shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    keys = jax.random.split(key, 3)
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


@jax.jit
def read_prompt(query, key, value):
    """Return a state that holds the prompt."""
    state = ATTENTION.init_state(SHAPES, 1, PROMPT, STEPS, jnp.float32)
    where = {"sequence": SEQUENCE, "length": jnp.int32(PROMPT)}
    _, state = ATTENTION.prefill(LAYER, query, key, value, state, **where)
    return ATTENTION.finish_prefill(state, *where.values())


@functools.partial(jax.jit, donate_argnums=0)  # the state is updated in place
def decode_all(state, query, key, value):
    """Return outputs `[STEPS, 1, 1, HEADS, HEAD_DIM]` of as many steps, and the new state."""

    def step(state, token):
        state = ATTENTION.grow(state)
        output, state = ATTENTION.decode(LAYER, *token, state)
        return ATTENTION.advance(state, jnp.ones(1, bool)), output

    # [1, STEPS, heads, dim] to [STEPS, 1, 1, heads, dim]: one token a step.
    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1)[:, :, None], (query, key, value))
    return jax.lax.scan(step, state, tokens)


def main() -> None:
    """Read a prompt, decode 32 steps in one program, and compare them with full attention."""
    prompt, answer = (
        random_tokens(jax.random.key(seed), n) for seed, n in ((0, PROMPT), (1, STEPS))
    )
    state = read_prompt(*prompt)
    before = int(state.index.tokens[0])
    state, outputs = decode_all(state, *answer)
    print(f"{STEPS} steps in one program: outputs {outputs.shape}")
    print(f"the index grew from {before} to {int(state.index.tokens[0])} tokens")
    assert int(state.index.tokens[0]) > before

    keys, values = (jnp.concatenate(both, 1) for both in zip(prompt[1:], answer[1:], strict=True))
    exact = jax.nn.dot_product_attention(answer[0][:, -1:], keys, values)
    error = float(jnp.abs(outputs[-1] - exact).max())
    print(f"against full attention, the last step is off by {error:.3f} at most")
    assert error < 0.5


if __name__ == "__main__":
    main()
