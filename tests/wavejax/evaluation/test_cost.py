"""Bytes counted from settings are those of the arrays that a real step uses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.types import NO_ID
from tests.support.attention_harness import model_of, prefill, random_stream
from tests.support.tiny_generator import CONFIG
from wavejax import DenseAttention, WaveAttention, WaveConfig
from wavejax.attention import retrieval
from wavejax.attention.protocol import scale_of
from wavejax.evaluation.baselines import PAGE_TOKENS, SparseAttention
from wavejax.evaluation.cost import clusters_asked_for, cost_of
from wavejax.store.shape import CacheShape

LENGTH = 300
MOMENTS = {"moment_rank": 2, "moment_dtype": "int8", "bounds": True, "reach": 2.0}
PAPER = {"token_codes": False, "estimation_fraction": 0.232, "retrieval_fraction": 0.1}


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def stream(model):
    return random_stream(model, np.random.default_rng(5), LENGTH + 1, 1)


def started(attention, model, stream):
    shape = CacheShape.of(model)
    state = attention.init_state(shape, 1, LENGTH, 8, jnp.float32)
    return prefill(attention, state, stream, [LENGTH], room=LENGTH)[1]


def bytes_of(*arrays):
    return sum(np.asarray(array).nbytes for array in arrays)


def used(config, model, stream):
    """A step's real arrays, cut to what is used of each: bytes by part, and how many clusters."""
    attention = WaveAttention(config, "device")
    state = started(attention, model, stream)
    layer, step = jnp.int32(0), [x[:, LENGTH][:, None] for x in stream]
    selection, state = attention.select(layer, *step, state)
    index, steady, scale = state.index, state.steady, scale_of(step[0])
    scores = retrieval.score_clusters(selection.query, index, layer, scale=scale)
    query = selection.query
    chosen = retrieval.select_clusters(config, query, scores, index, layer, scale=scale)
    found = dict.fromkeys(("clusters", "moments", "codes", "means", "rows", "steady"), 0)
    counts = []
    for head in range(model.num_kv_heads):
        at = (0, 0, head)
        n = int(index.num_clusters[at])
        counts.append(n)
        found["clusters"] += bytes_of(index.centroids[at][:n], index.offsets[at][:n])
        if index.covariance is not None:
            found["moments"] += bytes_of(index.covariance[at])
        if index.deviations is not None:
            found["clusters"] += bytes_of(index.deviations[at][:n])
        some = np.asarray(selection.estimated[0, head]) > 0
        found["means"] += bytes_of(np.asarray(index.value_means[at])[some])
        if index.moments is not None:
            kept = index.moments
            found["moments"] += bytes_of(kept.directions[at][:n])
            others = (kept.weights, kept.lambdas, kept.weight_scales, *index.spread)
            found["moments"] += bytes_of(*(np.asarray(x[at])[some] for x in others))
        tokens = np.asarray(selection.tokens[0, head])
        tokens = tokens[tokens != NO_ID]
        found["codes"] += bytes_of(index.token_ids[at][: len(tokens)])
        if index.codes is not None:
            end = int(chosen.starts[0, head, -1])
            found["codes"] += bytes_of(index.codes[at][:end], index.scales[at][:end])
        found["rows"] += bytes_of(state.store.rows.data[at][tokens])
        if state.store.rows.scales is not None:
            found["rows"] += bytes_of(state.store.rows.scales[at][tokens])
        window = int(steady.window_tokens[0]) + 1
        found["steady"] += bytes_of(steady.sink[at], steady.window[at][:window])
    return found, float(np.mean(counts)), state


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="default"),
        pytest.param(MOMENTS, id="moments", marks=pytest.mark.slow),
        pytest.param({"pooled_covariance": True}, id="pooled"),
        pytest.param({"row_dtype": "int8"}, id="int8", marks=pytest.mark.slow),
        pytest.param(PAPER, id="whole clusters", marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_of_the_arrays_that_a_step_uses(model, stream, settings):
    config = dataclasses.replace(CONFIG, **settings)
    found, clusters, state = used(config, model, stream)
    attention, shape = WaveAttention(config, "device"), CacheShape.of(model)
    cost = cost_of(attention, shape, LENGTH, jnp.float32, clusters=clusters)
    step = dataclasses.asdict(cost.step)
    for part in ("clusters", "rows", "steady"):
        assert step[part] == pytest.approx(found[part] * shape.layers), part
    # The last candidate cluster is read whole, and which clusters are estimated a text decides.
    more = found["codes"] * shape.layers - step["codes"]
    code = 4 + 4
    assert 0 <= more <= shape.layers * shape.kv_heads * config.max_cluster_size * code
    for part in ("means", "moments"):
        assert step[part] == pytest.approx(found[part] * shape.layers, rel=0.25), part
    assert step["moments"] == 0 or {"moment_rank", "pooled_covariance"} & settings.keys()
    assert step["drawn"] == 0
    # The index itself: what finds tokens of one kv head.
    whole = [
        array[0, 0, head][: int(state.index.num_clusters[0, 0, head])]
        for head in range(shape.kv_heads)
        for array in (
            *(state.index.centroids, state.index.value_means, state.index.offsets),
            *(state.index.moments or ()),
            *(state.index.spread or ()),
            *([] if state.index.deviations is None else [state.index.deviations]),
        )
        if array is not None
    ]
    if state.index.covariance is not None:
        whole += [state.index.covariance[0, 0]]
    tokens = int(state.index.tokens[0])
    whole += [
        array[0, 0, head][:tokens]
        for head in range(shape.kv_heads)
        for array in (state.index.codes, state.index.scales, state.index.token_ids)
        if array is not None
    ]
    assert cost.index == pytest.approx(bytes_of(*whole) / tokens / shape.kv_heads)


@pytest.mark.parametrize("rank", ["mass", "recency", "page_bound"])
def test_baselines_read_the_rows_that_their_masks_say(model, stream, rank):
    attention = SparseAttention(dataclasses.replace(CONFIG, retrieval_fraction=0.1), rank)
    state = started(attention, model, stream)
    query, key, value = (x[:, LENGTH][:, None] for x in stream)
    state = attention.append(jnp.int32(0), key, value, state)
    read = np.asarray(attention.read(jnp.int32(0), query, state))[0]
    shape = CacheShape.of(model)
    row = 2 * shape.head_dim * 4
    expected = read.sum() * row * shape.layers
    found = cost_of(attention, shape, LENGTH, jnp.float32)
    pages = -(-280 // PAGE_TOKENS)  # 300 tokens without 4 sinks and 16 local ones
    if rank == "page_bound":
        expected += shape.layers * shape.kv_heads * pages * row
    assert found.step.total == expected
    assert found.index == (row * pages / 280 if rank == "page_bound" else 0)


def test_full_attention_reads_every_row(model):
    shape = CacheShape.of(model)
    full = cost_of(DenseAttention(), shape, LENGTH, jnp.bfloat16)
    count = shape.layers * shape.kv_heads * (LENGTH + 1)
    assert full.step.total == full.step.rows == count * 2 * shape.head_dim * 2
    rounded = cost_of(DenseAttention(row_dtype="int8"), shape, LENGTH, jnp.bfloat16)
    # A scale a key and a value, in float32.
    assert rounded.step.total == count * 2 * (shape.head_dim + 4)


def test_layers_and_kv_heads_multiply():
    def total(layers, kv_heads):
        shape = CacheShape(layers=layers, kv_heads=kv_heads, head_dim=16)
        return cost_of(WaveAttention(CONFIG), shape, LENGTH, jnp.float32).step.total

    assert total(3, 2) == 6 * total(1, 1) > 0


def test_the_default_index_takes_36_bytes_a_token_and_moments_what_they_are_made_of():
    shape = CacheShape(layers=3, kv_heads=2, head_dim=128)

    def index(**settings):
        attention = WaveAttention(WaveConfig(**settings), "device")
        return cost_of(attention, shape, 131072, jnp.bfloat16).index

    assert index() == pytest.approx(36.125, abs=0.01)
    # Directions and weights in 8 bits, a lambda and a scale each, of 32 tokens together.
    more = index(moment_rank=2, moment_dtype="int8") - index()
    assert more == pytest.approx(2 * (2 * 128 + 8) / 32, rel=1e-3)
    assert index(moment_rank=1) - index() == pytest.approx((4 * 128 + 4) / 32, rel=1e-3)


def test_clusters_asked_for_follow_segments_and_sizes():
    config = WaveConfig(segment_tokens=100, cluster_size=8, max_cluster_size=16)
    assert clusters_asked_for(config, 0) == 0
    assert clusters_asked_for(config, 50) == 7
    assert clusters_asked_for(config, 100) == 13
    assert clusters_asked_for(config, 250) == 13 + 13 + 7


def test_a_tolerance_reads_its_draws(model):
    shape = CacheShape.of(model)
    config = dataclasses.replace(CONFIG, tolerance=0.1, tolerance_draws=32)
    with_it, without = (
        cost_of(WaveAttention(each, "device"), shape, LENGTH, jnp.float32).step
        for each in (config, CONFIG)
    )
    row = 2 * shape.head_dim * 4
    assert with_it.total - without.total == shape.layers * shape.kv_heads * 32 * row
