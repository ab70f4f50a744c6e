"""Every array of a state has a name for each of its axes, and one name means one size."""

import jax
import jax.numpy as jnp
import pytest
from flax.linen import logical_to_mesh
from jax.sharding import PartitionSpec

from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax._pytree import logical_axes
from wavejax.attention.dense import DenseState
from wavejax.store.shape import CacheShape
from wavejax.store.state import WaveState

SHAPE, BATCH = CacheShape(layers=3, kv_heads=5, head_dim=96), 7
CONFIG = WaveConfig(
    sink_tokens=6, local_tokens=8, growth_tokens=16, segment_tokens=32, cluster_size=8,
    max_cluster_size=16, min_retrieved_tokens=1, cache_fraction=0.1,
)  # fmt: skip
WITHOUT_CODES = WaveConfig(**vars(CONFIG) | {"token_codes": False})
POOLED = WaveConfig(**vars(CONFIG) | {"pooled_covariance": True})
# What the names of a model's and its settings' sizes must be.
SIZES = {
    "layers": 3, "sequences": 7, "kv_heads": 5, "head_dim": 96, "key_value": 2, "code_words": 3,
    "sinks": 6, "window": 24,
}  # fmt: skip


def state_of(attention):
    return attention.init_state(SHAPE, BATCH, 200, 20, jnp.float32)


@pytest.mark.parametrize(
    "attention",
    [
        DenseAttention(),
        DenseAttention(row_dtype="int8"),
        WaveAttention(CONFIG, "host"),
        WaveAttention(WITHOUT_CODES, "host"),
        WaveAttention(POOLED, "host"),
    ],
    ids=["full", "full in int8", "wave", "without codes", "pooled"],
)
def test_each_axis_has_a_name_of_one_size(attention):
    state = state_of(attention)
    names = logical_axes(state)
    assert type(names) is type(state)
    sizes = dict(SIZES)
    for (path, array), spec in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(names), strict=True
    ):
        assert len(spec) == array.ndim, jax.tree_util.keystr(path)
        assert len(set(spec)) == len(spec)
        for name, size in zip(spec, array.shape, strict=True):
            assert sizes.setdefault(name, size) == size, (jax.tree_util.keystr(path), name)
    vectors = sizes.pop("vectors", None)  # of a square matrix
    assert vectors == (96 if attention == WaveAttention(POOLED, "host") else None)
    # The sizes tell the names apart: none could stand for another unseen.
    assert len(set(sizes.values())) == len(sizes) - 1  # two numbers of code words, as layers
    if attention.has_index:
        assert sizes["cluster_edges"] == sizes["clusters"] + 1
        assert set(sizes) == {*SIZES, "clusters", "cluster_edges", "tokens", "slots"}


def test_the_names_are_what_flax_maps_to_a_mesh():
    rules = [("kv_heads", "model"), ("sequences", "data")]
    found = logical_to_mesh(logical_axes(state_of(WaveAttention(CONFIG, "device"))), rules)
    assert isinstance(found, WaveState)
    assert found.store.rows.data == PartitionSpec(None, "data", "model", None, None, None)
    assert found.index.tokens == PartitionSpec("data")
    assert found.step == PartitionSpec()


def test_an_array_without_names_is_refused():
    class Other(DenseState):
        AXES = {"keys": {"data": ("layers",) * 5}}  # noqa: RUF012

    # As a state of one's own that names not all its arrays.
    jax.tree_util.register_dataclass(
        Other, data_fields=["keys", "values", "tokens"], meta_fields=[]
    )
    state = state_of(DenseAttention())
    with pytest.raises(KeyError, match="axes of values"):
        logical_axes(Other(state.keys, state.values, state.tokens))
