"""Put wave attention into a Flax model of your own.

Shows the calls that a decoder makes: `prefill` in each layer and `finish_prefill` for a prompt;
`grow`, `decode` in each layer and `advance` for a step. The model has no RoPE and no gated MLP, as
no model that wavejax loads: only its attention is wavejax's. Its parameters are random, so that it
says nothing; with all tokens retrieved its logits are those of full attention, which is checked.
Takes about 15 s on two CPU cores.

    python examples/own_flax_model.py
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from wavejax import CacheShape, DenseAttention, WaveAttention, WaveConfig

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 2, 4, 2, 16, 48, 96
PROMPT, STEPS = 200, 12
# `init_state` reads the numbers of layers, kv heads and dimensions of this, and no more.
SHAPES = CacheShape(layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
# Small zones, so that so short a text has an index; and every indexed token is retrieved.
CONFIG = WaveConfig(
    local_tokens=8,
    growth_tokens=32,
    segment_tokens=128,
    cluster_size=8,
    max_cluster_size=16,
    retrieval_fraction=1.0,
)


class Layer(nn.Module):
    """LayerNorm, attention by `attend`, a plain MLP."""

    @nn.compact
    def __call__(self, number, hidden, attend, state):
        """Hidden states `[batch, tokens, WIDTH]`; `attend` gets query, key and value by heads."""

        def heads(name, count):
            projected = nn.Dense(count * HEAD_DIM, use_bias=False, name=name)(normed)
            return projected.reshape(*normed.shape[:2], count, HEAD_DIM)

        normed = nn.LayerNorm()(hidden)
        query, key, value = heads("query", HEADS), heads("key", KV_HEADS), heads("value", KV_HEADS)
        attended, state = attend(jnp.int32(number), query, key, value, state)
        hidden += nn.Dense(WIDTH)(attended.reshape(*hidden.shape[:2], -1))
        return hidden + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(hidden)))), state


class OwnModel(nn.Module):
    """Embedding, layers, logits; the attention and its state are passed in."""

    @nn.compact
    def __call__(self, tokens, positions, attend, state):
        """Logits `[batch, tokens, VOCAB]` of int32 tokens, and the new state."""
        hidden = nn.Embed(VOCAB, WIDTH)(tokens) + nn.Embed(4096, WIDTH)(positions)
        for number in range(LAYERS):
            hidden, state = Layer()(number, hidden, attend, state)
        return nn.Dense(VOCAB)(nn.LayerNorm()(hidden)), state


def answer(model, params, attention, prompt):
    """Greedy tokens `[STEPS]` and their logits `[STEPS, VOCAB]`, of a prompt `[PROMPT]`."""
    sequence, length = jnp.int32(0), jnp.int32(PROMPT)

    @jax.jit
    def read(tokens):
        state = attention.init_state(SHAPES, 1, PROMPT, STEPS, jnp.float32)

        def attend(layer, query, key, value, state):
            where = {"sequence": sequence, "length": length}
            return attention.prefill(layer, query, key, value, state, **where)

        positions = jnp.arange(PROMPT)[None]
        logits, state = model.apply(params, tokens[None], positions, attend, state)
        return logits[:, -1], attention.finish_prefill(state, sequence, length)

    @jax.jit
    def step(logits, state):
        token = jnp.argmax(logits, -1)
        state = attention.grow(state)  # comes before a step's first layer
        positions = attention.lengths(state)[:, None]
        new, state = model.apply(params, token[:, None], positions, attention.decode, state)
        return token, new[:, 0], attention.advance(state, jnp.ones(1, bool))

    logits, state = read(prompt)
    tokens, seen = [], []
    for _ in range(STEPS):
        seen.append(logits[0])
        token, logits, state = step(logits, state)
        tokens.append(int(token[0]))
    return tokens, jnp.stack(seen)


def main() -> None:
    """Return the same model by full attention, by wave attention of all tokens, and of some."""
    model = OwnModel()
    prompt = jax.random.randint(jax.random.key(1), (PROMPT,), 0, VOCAB)

    def none(layer, query, key, value, state):
        return query, state

    params = model.init(jax.random.key(0), prompt[None, :1], jnp.zeros((1, 1), int), none, None)
    some = dataclasses.replace(CONFIG, retrieval_fraction=0.2, min_retrieved_tokens=16)
    full, expected = answer(model, params, DenseAttention(), prompt)
    print("full attention:        ", full)
    for name, config in (("wave, all tokens:  ", CONFIG), ("wave, a fifth:     ", some)):
        tokens, logits = answer(model, params, WaveAttention(config, store="device"), prompt)
        error = float(jnp.abs(logits - expected).max())
        print(f"{name}    ", tokens, f"largest error of a logit {error:.1e}")
        assert config is some or (error < 1e-3 and tokens == full), "all tokens are exact"


if __name__ == "__main__":
    main()
