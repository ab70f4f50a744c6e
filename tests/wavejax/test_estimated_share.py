"""Which clusters are estimated: past what is retrieved the nearest, to the share asked for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.select_tokens.reference import empty_table
from pallas_kernels.types import ClusterScores, Retrieved
from wavejax import WaveConfig
from wavejax.attention.retrieval import to_estimate
from wavejax.store.index import init_index
from wavejax.store.shape import CacheShape

CLUSTERS, SIZE = 20, 10  # 200 tokens; the nearest cluster comes first


def estimated(fraction, retrieved=0.1):
    """How many members of each cluster are estimated, if nothing is kept from the estimate."""
    config = WaveConfig(
        retrieval_fraction=retrieved, min_retrieved_tokens=0, estimation_fraction=fraction
    )
    index = init_index(config, CacheShape(1, 1, 32), 1, CLUSTERS, CLUSTERS * SIZE, 0, jnp.float32)
    offsets = SIZE * jnp.arange(CLUSTERS + 1, dtype=jnp.int32)
    index = dataclasses.replace(
        index, offsets=offsets[None, None, None], tokens=jnp.full(1, CLUSTERS * SIZE, jnp.int32)
    )
    logits = -jnp.arange(CLUSTERS, dtype=jnp.float32)[None, None, None]
    scores = ClusterScores(logits, jnp.zeros((1, 1, 1)))
    none = jnp.zeros((1, 1, 1), jnp.int32)
    sizes = jnp.full((1, 1, CLUSTERS), SIZE, jnp.int32)
    table = empty_table((1, 1, 1), CLUSTERS * SIZE, 0)
    found = Retrieved(none, none, none > 0, sizes, table, none[0], none[0])
    return np.asarray(to_estimate(config, scores, found, index, jnp.int32(0)))[0, 0]


@pytest.mark.parametrize("fraction, clusters", [(0.3, 2 + 6), (0.05, 2 + 1), (0.9, 20), (1.0, 20)])
def test_the_share_begins_where_what_is_retrieved_ends(fraction, clusters):
    """A tenth is retrieved: two clusters' worth, which the share does not pay for."""
    found = estimated(fraction)
    assert found.tolist() == [SIZE] * clusters + [0] * (CLUSTERS - clusters)


def test_a_share_of_nothing_estimates_nothing():
    assert not estimated(0.0).any()
