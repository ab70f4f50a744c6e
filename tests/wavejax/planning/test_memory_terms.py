"""Each term of the planner's need where it is the one that matters: held to bytes that the compiled
programs take, so that a term which is dropped, or forgets a factor, is missed."""

import jax.numpy as jnp
import pytest

from models.config import ModelConfig
from tests.wavejax.planning.test_memory import compiled_workspace
from wavejax import DenseAttention, Sampler, WaveAttention, WaveConfig
from wavejax.planning.memory import memory_need

# It looks at compiled programs.
pytestmark = pytest.mark.optimised

NEW = 64
FEW = {"growth_tokens": NEW, "min_retrieved_tokens": 8, "min_candidate_tokens": 32}
FEW |= {"min_clusters": 0}


def model_of(vocab=100, layers=2, hidden=32, inner=32, heads=1, kv_heads=1, head_dim=32):
    """A model that is small but for what is named."""
    return ModelConfig("llama", vocab, layers, hidden, inner, heads, kv_heads, head_dim, 10**6)


INT8 = DenseAttention(row_dtype="int8")

# What dominates: the model, the settings (None: full attention, or as it is), sequences, the
# prompt's room, and how much more than what is taken the need may be. Less would be left without
# the term.
CASES = {
    "scores of a segment's clusters": (
        model_of(),
        WaveConfig(**FEW, segment_tokens=4096, cluster_size=4, max_cluster_size=8),
        *(1, 4096, 1.4),
    ),
    "a call's segments side by side": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        WaveConfig(**FEW, segment_tokens=1024),
        *(1, 16384, 1.15),
    ),
    "the MLP of all tokens": (model_of(inner=8192), None, 1, 2048, 1.2),
    "the MLP of a block of tokens": (model_of(inner=16384), None, 1, 16384, 1.2),
    "queries and their logits": (model_of(heads=8, head_dim=128), None, 1, 8192, 1.6),
    "keys and values as they are written to the cache": (
        model_of(heads=4, kv_heads=4, head_dim=256),
        None,
        *(1, 8192, 1.1),
    ),
    "keys and values as they are rounded": (
        model_of(heads=4, kv_heads=4, head_dim=256),
        INT8,
        *(1, 8192, 1.1),
    ),
    "levels of many narrow heads": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        INT8,
        *(1, 8192, 1.1),
    ),
    "keys and values of many narrow heads": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        None,
        *(1, 8192, 1.2),
    ),
    "the residual stream": (model_of(hidden=1024, heads=2, head_dim=256), None, 1, 8192, 1.3),
    "a layer's weights": (model_of(hidden=1024, inner=4096), None, 1, 64, 1.4),
    "the index's clusters in a step": (
        model_of(kv_heads=4, heads=4, head_dim=64),
        WaveConfig(
            **FEW, candidate_fraction=0.02, segment_tokens=256, cluster_size=2, max_cluster_size=4
        ),
        *(128, 4096, 1.3),
    ),
    "the moments of a prompt": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        WaveConfig(**FEW, moment_rank=4, segment_tokens=1024, cluster_size=4, max_cluster_size=8),
        *(1, 16384, 1.4),
    ),
    "the moments in a step": (
        model_of(kv_heads=4, heads=4, head_dim=64),
        WaveConfig(
            **FEW,
            moment_rank=4,
            moment_dtype="int8",
            candidate_fraction=0.02,
            segment_tokens=256,
            cluster_size=4,
            max_cluster_size=8,
        ),
        *(64, 4096, 1.5),
    ),
    "what is drawn to hold a tolerance": (
        model_of(heads=8, kv_heads=1, head_dim=64),
        WaveConfig(**FEW, tolerance=0.1, tolerance_draws=4096, segment_tokens=256),
        *(16, 1024, 1.5),
    ),
    "the window in a step": (
        model_of(kv_heads=4, heads=4, head_dim=64),
        WaveConfig(**FEW | {"growth_tokens": 2048}),
        *(64, 4096, 1.3),
    ),
    "a layer of the dense cache in a step": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        None,
        *(64, 4096, 1.6),
    ),
    "a layer of levels in a step": (
        model_of(heads=8, kv_heads=8, head_dim=64),
        INT8,
        *(64, 4096, 1.3),
    ),
}


@pytest.mark.slow(25)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_workspace_holds_what_dominates(case):
    model, config, batch, room, most = case
    attention = config or DenseAttention()
    if isinstance(attention, WaveConfig):
        attention = WaveAttention(attention, "device")
    need = memory_need(model, attention, batch, room, NEW, jnp.float32)
    prefill, decode = compiled_workspace(model, attention, batch, room, NEW)
    # The residual stream goes in and out of the program: no temporary of its own.
    prefill += 3 * room * model.hidden_size * 4
    assert max(prefill, decode) <= need.workspace <= most * max(prefill, decode)


@pytest.mark.parametrize(
    "sampler, most",
    [(Sampler(temperature=1.0, top_k=50), 4), (Sampler(temperature=1.0, top_p=0.9), 1.2)],
    ids=["few ranked", "all ranked"],
)
def test_the_workspace_holds_the_logits_that_are_drawn_from(sampler, most):
    model = model_of(vocab=100_000)
    need = memory_need(model, DenseAttention(), 64, 64, NEW, jnp.float32, sampler)
    _, decode = compiled_workspace(model, DenseAttention(), 64, 64, NEW, sampler=sampler)
    logits = 64 * 100_000 * 4
    assert logits <= decode <= need.workspace <= most * decode
    # Whoever does not know the sampler makes room for any.
    unknown = memory_need(model, DenseAttention(), 64, 64, NEW, jnp.float32)
    assert need.workspace <= unknown.workspace


def on_the_way(model, config, batch, room):
    """What the rows add that are staged, to the same run with its rows on the device."""
    staged, device = (
        memory_need(model, WaveAttention(config, *where), batch, room, NEW, jnp.float32)
        for where in (("host", "staged"), ("device",))
    )
    assert staged.rows == device.rows
    return staged.workspace - device.workspace, staged


def test_a_layers_staged_rows_leave_as_the_next_is_read():
    model = model_of(layers=3, kv_heads=4, heads=4)
    added, need = on_the_way(model, WaveConfig(**FEW), 2, 4096)
    assert added == need.rows // (3 * 2)


# A token of one layer: kv heads, key and value, head dim, bytes.
TOKEN = 4 * 2 * 32 * 4


def test_staged_rows_of_two_layers_are_on_the_way_in_a_step():
    """Where a step dominates: a batch so large that reading one prompt takes less."""
    config = WaveConfig(**FEW | {"min_retrieved_tokens": 512})
    added, _ = on_the_way(model_of(kv_heads=4, heads=4), config, 128, 1024)
    layer = 128 * 512 * TOKEN
    # Two layers', and one's as they are attended to, values in float32.
    assert 3 * layer <= added <= 4.1 * layer


def test_a_growths_staged_rows_leave_in_all_layers_at_once():
    config = WaveConfig(**FEW | {"growth_tokens": 512})
    added, _ = on_the_way(model_of(layers=200, kv_heads=4, heads=4), config, 64, 64)
    assert added >= 200 * 512 * TOKEN
