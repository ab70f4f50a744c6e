"""The settings: what is refused, the paper's, and capacities that hold what the device asks for."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wavejax import InputError, WaveConfig
from wavejax.attention.retrieval import budgets
from wavejax.store.prompt import indexed_tokens

SIZES = ("local_tokens", "growth_tokens", "segment_tokens", "cluster_size")
COUNTS = (
    *("sink_tokens", "min_clusters", "kmeans_iterations"),
    *("min_candidate_tokens", "min_retrieved_tokens"),
)
SHARES = (
    *("candidate_fraction", "retrieval_fraction", "min_token_mass"),
    *("estimation_fraction", "cache_fraction", "audit", "tolerance"),
)

OUT_OF_RANGE = [
    *((name, value, 1, 65536) for name in SIZES for value in (0, -3, 65537)),
    *((name, value, 0, 2**31 - 1) for name in COUNTS for value in (-1, 2**31)),
    *((name, value, 0, 1) for name in SHARES for value in (-0.01, 1.01, float("nan"), 2)),
    ("max_cluster_size", 31, 32, 65536),  # The default cluster_size is 32.
    ("max_cluster_size", 65537, 32, 65536),
    *(("admission_ratio", value, 1, 10**9) for value in (0, 0.99, 2e9, float("nan"))),
]


@pytest.mark.parametrize("name, value, low, high", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_range(name, value, low, high):
    with pytest.raises(InputError) as error:
        WaveConfig(**{name: value})
    assert str(error.value) == f"`{name}` is {value}; it must be from {low} to {high}"


def test_a_value_that_is_none_of_a_few_is_named_with_them():
    with pytest.raises(InputError, match="`moment_rank` is 3; it must be one of 0, 1, 2, 4"):
        WaveConfig(moment_rank=3)
    with pytest.raises(InputError, match="`moment_dtype` is int4; it must be one of model, "):
        WaveConfig(moment_dtype="int4")
    with pytest.raises(InputError, match="`bounds` want moments: give `moment_rank` of 1, 2 or 4"):
        WaveConfig(bounds=True)


@pytest.mark.parametrize("field", dataclasses.fields(WaveConfig), ids=lambda field: field.name)
def test_a_value_of_another_type_is_named_with_the_type(field):
    kind = type(field.default)
    wrong = [
        8 if kind is str else "8",
        None,
        1.5 if kind in (int, str) else "0.5",
        True if kind is not bool else 1,
    ]
    for value in wrong:
        # Past `__init__`, which the tests' own type checks guard.
        config = object.__new__(WaveConfig)
        for each in dataclasses.fields(WaveConfig):
            object.__setattr__(config, each.name, value if each is field else each.default)
        with pytest.raises(InputError) as error:
            config.__post_init__()
        message = f"`{field.name}` is {value!r}; it must be of type {kind.__name__}"
        assert str(error.value) == message


def test_every_field_is_checked_and_explained():
    checked = {*SIZES, *COUNTS, *SHARES, "max_cluster_size", "admission_ratio", "token_codes"}
    checked |= {"moment_rank", "moment_dtype", "row_dtype", "bounds"}
    checked |= {"delta", "tolerance_draws", "tolerance_cap", "exact_fallback"}  # test_tolerance.py
    checked |= {"reach"}  # test_reach.py
    checked |= {"pooled_covariance"}  # test_covariance.py
    assert checked == {field.name for field in dataclasses.fields(WaveConfig)}
    assert all(field.metadata["help"] for field in dataclasses.fields(WaveConfig))


def test_the_ends_of_the_ranges_are_allowed():
    for name in SHARES:
        for value in (0, 1, 0.0, 1.0):
            assert getattr(WaveConfig(**{name: value}), name) == value
    for name in COUNTS:
        assert getattr(WaveConfig(**{name: 0}), name) == 0
    WaveConfig(cluster_size=1, max_cluster_size=1)
    assert WaveConfig(admission_ratio=1e9).admission_ratio == 1e9
    WaveConfig(segment_tokens=65536, growth_tokens=65536, max_cluster_size=65536)


@pytest.mark.parametrize("name", ["segment_tokens", "growth_tokens"])
@pytest.mark.parametrize("tokens, least", [(65536, 4), (46341, 3), (32768, 1), (1, 1)])
def test_clusters_whose_middles_int32_cannot_count_are_refused(name, tokens, least):
    def most(size):
        return (2 * -(-tokens // size) - 1) * tokens

    assert most(least) < 2**31
    WaveConfig(**{name: tokens, "cluster_size": least})
    if least > 1:
        assert most(least - 1) >= 2**31
        with pytest.raises(InputError, match=f"`{name}` of {tokens} it must be {least} or more"):
            WaveConfig(**{name: tokens, "cluster_size": least - 1})


def test_the_papers_settings():
    paper = WaveConfig.paper()
    assert not paper.token_codes
    assert (paper.cluster_size, paper.segment_tokens) == (16, 8192)
    # A cluster may hold its whole segment: there is no limit.
    assert paper.max_cluster_size == paper.segment_tokens
    assert (paper.retrieval_fraction, paper.estimation_fraction) == (0.018, 0.232)
    assert paper.min_retrieved_tokens == 0
    assert paper.cluster_sizes(1000) == (16, 8192)
    assert (paper.sink_tokens, paper.local_tokens, paper.growth_tokens) == (4, 64, 1024)
    assert paper.cache_fraction == 0.05
    changed = WaveConfig.paper(cluster_size=32, sink_tokens=8)
    assert changed == dataclasses.replace(paper, cluster_size=32, sink_tokens=8)


@pytest.mark.parametrize(
    "prompt, indexed",
    [
        (0, 0),
        (1, 0),
        (4, 0),  # the sink alone
        (4 + 64 + 1024 - 1, 0),  # the window has room for one more
        (4 + 64 + 1024, 1024),  # it is full: all but the local tokens are indexed
        (4 + 64 + 1025, 1025),
        (131072, 131072 - 68),
    ],
)
def test_indexed_tokens_at_the_edges(prompt, indexed):
    config = WaveConfig()
    assert config.indexed_tokens(prompt) == indexed
    assert int(indexed_tokens(config, jnp.int32(prompt))) == indexed


@settings(deadline=None)
@given(
    config=st.builds(
        WaveConfig,
        sink_tokens=st.integers(0, 100),
        local_tokens=st.integers(1, 300),
        growth_tokens=st.integers(1, 300),
    ),
    prompt=st.integers(0, 1000),
)
def test_a_prompt_always_leaves_the_window_room_for_a_token(config, prompt):
    indexed = config.indexed_tokens(prompt)
    assert 0 <= indexed <= prompt
    window = prompt - min(prompt, config.sink_tokens) - indexed
    assert 0 <= window < config.window_tokens
    assert indexed == 0 or window == config.local_tokens
    assert int(indexed_tokens(config, jnp.int32(prompt))) == indexed


FRACTION = st.floats(0, 1) | st.sampled_from([0.009, 0.018, 0.25, 0.1, 1 / 3])


@settings(deadline=None)
@given(
    config=st.builds(
        WaveConfig,
        retrieval_fraction=FRACTION,
        candidate_fraction=FRACTION,
        min_candidate_tokens=st.integers(0, 12000),
        min_retrieved_tokens=st.integers(0, 3000),
        token_codes=st.booleans(),
        max_cluster_size=st.integers(32, 64),
    ),
    tokens=st.integers(0, 2**21),
    spare=st.integers(0, 4096),
)
# 0.1 and 0.07 are a little more in float32, so that the device rounds up where Python does not.
@example(WaveConfig(retrieval_fraction=0.1, min_retrieved_tokens=0), 1_000_000, 0)
@example(WaveConfig(candidate_fraction=0.1, min_candidate_tokens=0), 1_000_000, 0)
def test_capacities_hold_what_the_device_asks_for(config, tokens, spare):
    # `tokens` are in the index now, whose capacity is that and some more.
    retrieved, candidates = budgets(config, jnp.int32(tokens))
    room = max(1, tokens + spare)
    assert 0 <= int(retrieved) <= int(candidates) <= tokens
    assert int(retrieved) <= config.most_retrieved(room) <= room
    # Whole clusters are taken until the budget is full: the last may go past it.
    taken = min(int(candidates) + config.max_cluster_size, tokens)
    assert taken <= config.most_candidates(room) <= room


@pytest.mark.parametrize(
    "config, tokens, sizes",
    [
        (WaveConfig(), 1_000_000, (32, 64)),
        (WaveConfig(), 32 * 3072, (32, 64)),
        (WaveConfig(), 32 * 3072 - 1, (16, 32)),
        (WaveConfig(), 16 * 3072 - 1, (8, 16)),
        (WaveConfig(), 1, (8, 16)),  # no smaller ones
        (WaveConfig(min_clusters=0), 1, (32, 64)),
        (WaveConfig(cluster_size=15, max_cluster_size=15), 1, (15, 15)),  # half is less than 8
        (WaveConfig(cluster_size=16, max_cluster_size=1000), 5000, (8, 500)),
        (WaveConfig(cluster_size=1, max_cluster_size=1), 5000, (1, 1)),
    ],
)
def test_short_contexts_have_smaller_clusters(config, tokens, sizes):
    assert config.cluster_sizes(tokens) == sizes


@pytest.mark.parametrize(
    "config, tokens, slots",
    [
        (WaveConfig(), 1_000_000, 50_000),
        (WaveConfig(), 80 * 4096, 4 * 4096),
        (WaveConfig(), 20_000, 4 * 4096),  # as many for as many retrieved
        (WaveConfig(), 5000, 5000),  # never more than tokens
        (WaveConfig(min_retrieved_tokens=1024), 122_880, 6144),
        (WaveConfig(cache_fraction=0.0), 20_000, 1),
        (WaveConfig(cache_fraction=0.01), 5000, 3277),
        (WaveConfig(min_retrieved_tokens=0), 20_000, 1000),
        (WaveConfig.paper(), 20_000, 1000),
    ],
)
def test_cache_slots_in_step_with_the_tokens_retrieved(config, tokens, slots):
    assert config.cache_slots(tokens) == slots
