"""The kernels that score and select, interpreted against their references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.encode_tokens import rotate
from pallas_kernels.score_clusters import reference as score_clusters_reference
from pallas_kernels.score_clusters import triton as score_clusters
from pallas_kernels.score_tokens import _query
from pallas_kernels.score_tokens import reference as score_tokens_reference
from pallas_kernels.score_tokens import triton as score_tokens
from pallas_kernels.select_clusters import list_candidates
from pallas_kernels.select_clusters import reference as select_clusters_reference
from pallas_kernels.select_clusters import triton as select_clusters
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.select_tokens import reference as select_tokens_reference
from pallas_kernels.select_tokens import triton as select_tokens
from pallas_kernels.types import (
    MASKED,
    Candidates,
    ClusterScores,
    IndexedTokens,
    RankedTokens,
    Reach,
    SelectionSettings,
    TokenCodes,
)

LAYERS, BATCH, HEADS, LAYER = 2, 2, 3, 1


def random_sizes(rng, clusters, most=8):
    """Sizes of each row's clusters, some empty, a quarter of the capacity not in use."""
    sizes = rng.integers(0, most + 1, (LAYERS, BATCH, HEADS, clusters))
    sizes[..., clusters * 3 // 4 :] = 0
    sizes[LAYER, 1, 1] = 0  # a row with nothing in it
    edges = np.concatenate([np.zeros((LAYERS, BATCH, HEADS, 1), int), sizes.cumsum(-1)], -1)
    return sizes, jnp.asarray(edges, jnp.int32)


@pytest.mark.parametrize("group, head_dim, clusters, blocks", [(4, 64, 100, 2), (7, 96, 40, 1)])
def test_score_clusters(group, head_dim, clusters, blocks):
    rng = np.random.default_rng(group)
    sizes, offsets = random_sizes(rng, clusters)
    query = jnp.asarray(rng.normal(size=(BATCH, HEADS, group, head_dim)), jnp.float32)
    centroids = rng.normal(size=(LAYERS, BATCH, HEADS, clusters, head_dim)).astype(np.float32)
    poisoned = jnp.asarray(np.where(sizes[..., None] > 0, centroids, np.nan))
    config = score_clusters.Config(32, blocks)
    found = score_clusters.score_clusters(
        query, poisoned, offsets, LAYER, scale=0.1, config=config, interpret=True
    )
    expected = score_clusters_reference.score_clusters(
        query, jnp.asarray(centroids), offsets, LAYER, scale=0.1
    )
    for x, y in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(x > MASKED / 2, y > MASKED / 2)
        np.testing.assert_allclose(x, y, atol=3e-6)


@pytest.mark.parametrize("group, head_dim, dtype", [(1, 64, "bfloat16"), (7, 96, "float16")])
def test_score_clusters_rotates_the_query(group, head_dim, dtype):
    rng = np.random.default_rng(head_dim)
    _, offsets = random_sizes(rng, 40)
    query = jnp.asarray(rng.normal(size=(BATCH, HEADS, group, head_dim)), dtype)
    centroids = jnp.asarray(rng.normal(size=(LAYERS, BATCH, HEADS, 40, head_dim)), dtype)
    operands, config = (query, centroids, offsets, LAYER), score_clusters.Config(32)
    score = functools.partial(
        score_clusters.score_clusters, *operands, scale=0.1, config=config, interpret=True
    )
    found, plain = score(rotated=True), score()
    assert plain.rotated is None
    for x, y in zip(found[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    # What XLA rotates and the other kernel packs, but for what int8 rounds the other way.
    expected = _query.pack(rotate(query), scale=0.1, interpret=True)
    for x, y in zip(found.rotated[1:], expected[1:], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2)
    codes = [np.asarray(x.fragments).view(np.int8).astype(int) for x in (found.rotated, expected)]
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() < 0.02
    assert codes[1].any()
    upcast = score_clusters.score_clusters(
        *(query.astype(jnp.float32), centroids.astype(jnp.float32), offsets, LAYER),
        scale=0.1,
        rotated=True,
        config=config,
        interpret=True,
    )
    np.testing.assert_array_equal(upcast.rotated, rotate(query.astype(jnp.float32)))


# In registers, by several programs, also where half of the tile holds all in use; by a sample that
# splits some off, and by one that tells nothing; more contenders than registers hold; clusters
# larger than a granule of the list.
@pytest.mark.parametrize(
    "group, clusters, most, budget, config",
    [
        (1, 100, 70, [17, 10**6], select_clusters.Config(32, 32, True, 128)),
        (1, 100, 70, [17, 900], select_clusters.Config(32, 32, True, 256)),
        (7, 90, 5, [0, 90], select_clusters.Config(32, 128, True, 128)),
        (1, 1000, 5, [900, 90], select_clusters.Config(128, 256, False, 512, 512)),
        (2, 400, 40, [3000, 10**6], select_clusters.Config(128, 128, False, 64, 512)),
        (1, 200, 40, [300, 0], select_clusters.Config(128, 64, False, 32, 16)),
    ],
)
def test_select_clusters_exactly(group, clusters, most, budget, config):
    rng = np.random.default_rng(clusters)
    sizes, offsets = random_sizes(rng, clusters, most)
    # Coarse values make ties, and heads that agree keep them in any arithmetic.
    logits = np.round(rng.normal(size=(BATCH, HEADS, 1, clusters)) * 3) * np.ones((group, 1)) - 9
    logits = np.where(sizes[LAYER][:, :, None] > 0, logits, MASKED).astype(np.float32)
    operands = (
        jnp.asarray(logits),
        jnp.zeros((BATCH, HEADS, group)),
        offsets,
        LAYER,
        jnp.asarray(budget, jnp.int32),
    )
    room = int(offsets.max()) // 2
    found = select_clusters.select_clusters(
        *operands, max_candidates=room, config=config, interpret=True
    )
    expected = select_clusters_reference.select_clusters(*operands, max_candidates=room)
    for field, x, y in zip(Candidates._fields, found, expected, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=field)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_select_clusters_by_reach_exactly(dtype):
    """Of small whole numbers: with them any arithmetic is exact."""
    rng, group, clusters = np.random.default_rng(3), 3, 100
    sizes, offsets = random_sizes(rng, clusters, 70)
    logits = np.round(rng.normal(size=(BATCH, HEADS, 1, clusters)) * 3) * np.ones((group, 1)) - 9
    logits = np.where(sizes[LAYER][:, :, None] > 0, logits, MASKED).astype(np.float32)
    lengths = rng.integers(0, 4, (BATCH, HEADS, 1)) * np.ones(group)
    deviations = rng.integers(0, 5, sizes.shape).astype(np.float32)
    deviations[sizes == 0] = np.nan
    reach = Reach(jnp.asarray(lengths, jnp.float32), jnp.asarray(deviations, dtype))
    operands = (
        *(jnp.asarray(logits), jnp.zeros((BATCH, HEADS, group)), offsets, LAYER),
        jnp.asarray([170, 900], jnp.int32),
    )
    given = {"max_candidates": int(offsets.max()) // 2, "reach": reach}
    config = select_clusters.Config(32, 32, True, 128)
    found = select_clusters.select_clusters(*operands, **given, config=config, interpret=True)
    expected = select_clusters_reference.select_clusters(*operands, **given)
    for field, x, y in zip(Candidates._fields, found, expected, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=field)
    plain = select_clusters_reference.select_clusters(
        *operands, max_candidates=given["max_candidates"]
    )
    assert not np.array_equal(plain.selected, expected.selected)


# The query in float32 parts by `dot`, in int8 by what stands in for the assembly, and no codes.
@pytest.mark.parametrize(
    "group, head_dim, dtype, coded",
    [(4, 64, "float32", True), (7, 96, "bfloat16", True), (2, 128, "float32", False)],
)
def test_score_tokens(group, head_dim, dtype, coded):
    rng = np.random.default_rng(head_dim)
    clusters = 60
    sizes, offsets = random_sizes(rng, clusters)
    tokens = int(offsets.max())
    selected = jnp.asarray(rng.random((BATCH, HEADS, clusters)) < 0.5)
    room = 150
    candidates = list_candidates(selected, jnp.asarray(sizes[LAYER], jnp.int32), room)
    query = jnp.asarray(rng.normal(size=(BATCH, HEADS, group, head_dim)), jnp.float32)
    words = -(-head_dim // 32)
    codes = rng.integers(0, 2**32, (LAYERS, BATCH, HEADS, tokens, words), dtype=np.uint32)
    scales = jnp.asarray(rng.uniform(size=(LAYERS, BATCH, HEADS, tokens)), dtype)
    operands = (
        ClusterScores(
            jnp.asarray(rng.normal(size=(BATCH, HEADS, group, clusters)), jnp.float32),
            jnp.asarray(rng.normal(size=(BATCH, HEADS, group)), jnp.float32),
            query,
        ),
        candidates,
        offsets,
        TokenCodes(jnp.asarray(codes), scales) if coded else None,
        LAYER,
    )
    config = score_tokens.Config(64, integers=dtype == "bfloat16", num_warps=1)
    found = score_tokens.score_tokens(
        *operands, scale=0.1, max_candidates=room, config=config, interpret=True
    )
    expected = score_tokens_reference.score_tokens(*operands, scale=0.1, max_candidates=room)
    listed = expected > MASKED / 2
    np.testing.assert_array_equal(found > MASKED / 2, listed)
    error = jnp.linalg.norm(jnp.where(listed, found - expected, 0))
    limit = 1e-2 if dtype == "bfloat16" else 1e-6
    assert error < limit * jnp.linalg.norm(jnp.where(listed, expected, 0))


select = jax.jit(select_tokens.select_tokens, static_argnames=("settings", "config", "interpret"))
select_plainly = jax.jit(select_tokens_reference.select_tokens, static_argnames="settings")


# More contenders, or more slots, than registers hold; a cache of few slots, of one and of none; a
# budget past everything.
@pytest.mark.parametrize(
    "slots, most, config, admission_ratio",
    [
        (7, 24, select_tokens.Config(32, 64, 32, 32, 1, 1, 1, 1, 1), 1.0),
        (1, 10, select_tokens.Config(16, 32, 16, 64, 1, 1, 1, 1, 1), 1.0),
        (0, 24, select_tokens.Config(32, 64, 32, 32, 1, 1, 1, 1, 1), 1.0),
        (40, 24, select_tokens.Config(32, 64, 32, 4, 1, 1, 1, 1, 1), 1.0),
        (300, 400, None, 1.0),
        # A sample drawn and contenders joined by programs of their own; more than registers hold.
        (7, 24, select_tokens.Config(32, 32, 64, 32, 1, 1, 1, 1, 1, spread=True), 1.0),
        (40, 24, select_tokens.Config(64, 16, 16, 4, 1, 1, 1, 1, 1, spread=True), 3.0),
        # Rows that are not worth reading, of clusters in one block of picks, in two and in more.
        (7, 24, select_tokens.Config(32, 64, 32, 32, 1, 1, 1, 1, 1), 3.0),
        (40, 24, select_tokens.Config(32, 64, 32, 4, 1, 1, 1, 1, 1), 3.0),
        (5, 24, select_tokens.Config(16, 32, 16, 2, 1, 1, 1, 1, 1), 1.5),
        (300, 400, None, 3.0),
    ],
)
def test_select_tokens_exactly(slots, most, config, admission_ratio):
    rng = np.random.default_rng(slots)
    clusters = 60
    sizes, offsets = random_sizes(rng, clusters)
    tokens = int(offsets.max()) + 3
    row = (LAYERS, BATCH, HEADS)
    # The last 20 tokens were appended to the index, 8 at a time.
    prompt = tokens - 20
    ids = rng.permuted(np.broadcast_to(np.arange(prompt), (*row, prompt)), axis=-1)
    appended = np.broadcast_to(np.arange(20) % 8, (*row, 20))
    ids = np.concatenate([ids, appended], axis=-1)
    table = empty_table(row, tokens, slots)
    room = 140
    settings = SelectionSettings(most, 4096, 8, admission_ratio, with_clusters=True)
    # For each sequence in some cases, for each of its kv heads in others: both in all would be
    # twice as many programs.
    of_budget = (BATCH, HEADS)[: 1 + slots % 2]
    dropped = 0
    for step in range(7):
        selected = jnp.asarray(rng.random((BATCH, HEADS, clusters)) < 0.6)
        candidates = list_candidates(selected, jnp.asarray(sizes[LAYER], jnp.int32), room)
        log_mass = (rng.normal(size=(BATCH, HEADS, room)) * 2 - 9).astype(np.float32)
        if step == 3:
            log_mass = np.round(log_mass)  # ties
        if step == 4:
            log_mass[:] = -2  # nothing but ties: no sample tells them apart
        listed = jnp.arange(room) < candidates.starts[..., -1:]
        budget = rng.integers(0, most + 1, of_budget)
        ranked = RankedTokens(
            jnp.where(listed, log_mass, MASKED), candidates, jnp.asarray(budget, jnp.int32)
        )
        operands = (
            ranked,
            IndexedTokens(
                offsets, jnp.asarray(ids, jnp.uint16), jnp.full(BATCH, prompt, jnp.int32)
            ),
            table,
            LAYER,
            jnp.int32(step),
        )
        found = select(*operands, settings=settings, config=config, interpret=True)
        expected = select_plainly(*operands, settings=settings)
        for path, x in jax.tree_util.tree_leaves_with_path(found):
            y = functools.reduce(lambda tree, key: getattr(tree, key.name), path, expected)
            np.testing.assert_array_equal(x, y, err_msg=f"{path}, step {step}")
        table = expected.table
        wanted = jnp.minimum(ranked.budget.reshape(BATCH, -1), candidates.starts[..., -1])
        dropped += int(jnp.sum(jnp.minimum(wanted, room) - expected.hits - expected.misses))
    # While a cache still fills, every row is read.
    assert (dropped > 0) == (admission_ratio > 1 and slots < 300)
