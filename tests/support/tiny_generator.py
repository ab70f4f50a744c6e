"""A tiny random model, prompts and settings: generation in seconds, growth after 64 tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.decoder import Decoder
from wavejax import DenseAttention, Sampler, WaveAttention, WaveConfig

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=50,
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=100_000,
    rope_theta=1e4,
    norm_eps=1e-5,
)
CONFIG = WaveConfig(
    local_tokens=16,
    growth_tokens=64,
    segment_tokens=128,
    cluster_size=8,
    max_cluster_size=16,
    min_candidate_tokens=32,
    min_retrieved_tokens=8,
)
ATTENTIONS = {"wave": WaveAttention(CONFIG), "dense": DenseAttention()}
GREEDY = Sampler()
SAMPLED = Sampler(temperature=1.0, top_p=0.95)


@functools.cache
def make_params():
    """Random parameters, norm weights too: at 1 they would hide mistakes."""

    def no_attention(layer, query, key, value, state):
        return query, state

    ids = jnp.zeros((1, 1), jnp.int32)
    params = Decoder(MODEL, no_attention).init(jax.random.key(0), ids, ids, None)
    rng = np.random.default_rng(0)

    def randomise(path, leaf):
        if not path[-1].key.endswith("norm"):
            return leaf
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(randomise, params)


def make_prompts(lengths, seed=0):
    """Random token ids, as a tuple of tuples: the same for the same length."""
    return tuple(
        tuple(np.random.default_rng((seed, length)).integers(0, MODEL.vocab_size, length).tolist())
        for length in lengths
    )
