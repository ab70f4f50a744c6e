"""Every kernel at several heads, as what lowers it: one list for each test of a platform."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.append_rows import triton as append_rows
from pallas_kernels.attend_dense import triton as attend_dense
from pallas_kernels.attend_zones import triton as attend_zones
from pallas_kernels.score_clusters import triton as score_clusters
from pallas_kernels.score_tokens import _query
from pallas_kernels.score_tokens import triton as score_tokens
from pallas_kernels.select_clusters import triton as select_clusters
from pallas_kernels.select_tokens import empty_table
from pallas_kernels.select_tokens import triton as select_tokens
from pallas_kernels.types import (
    Candidates,
    ClusterScores,
    Correction,
    IndexedTokens,
    Moments,
    Pooled,
    RankedTokens,
    Reach,
    Rows,
    SelectionSettings,
    TokenCodes,
)
from tests.support.appended_kernel_cases import appended_calls
from tests.support.index_kernel_cases import index_calls
from tests.support.product_kernel_cases import product_calls
from tests.support.zone_operands import zone_operands

BATCH, HEADS, LAYERS = 8, 8, 2
TOKENS, SLOTS, CLUSTERS, RETRIEVED, WINDOW = 131_072, 6554, 6144, 1182, 1088
HOST = jax.memory.Space.Host


@dataclass(frozen=True)
class Heads:
    """What kernels are made for: heads, and the dtype of rows, means and scales."""

    group: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.group}x{self.head_dim}-{self.dtype}"


@dataclass(frozen=True)
class KernelCase:
    """A call of an op's kernels.

    Attributes:
        function: of arrays.
        operands: `jax.ShapeDtypeStruct` each, in pytrees.
        kernels: the names of the kernels that it launches.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    kernels: frozenset[str]


ALL_HEADS = (Heads(4, 128, "bfloat16"), Heads(7, 64, "float16"), Heads(1, 96, "float32"))


def kernel_cases(heads: Heads) -> Mapping[str, KernelCase]:
    """The kernels of all ops by a name of the call, for large shapes.

    Args:
        heads: of the queries and rows.
    """
    calls = _selection(heads) | _attention(heads) | index_calls(heads.head_dim, heads.dtype)
    calls |= product_calls(heads.dtype)
    calls |= appended_calls(heads.group, heads.head_dim, heads.dtype)
    return {name: KernelCase(call[0], call[1], frozenset(call[2])) for name, call in calls.items()}


def _of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def moments_of(row: tuple[int, ...], rank: int, head_dim: int, dtype: Any) -> Moments:
    """Shapes of the moments of clusters `row` in floats, or int8 levels with scales."""
    vectors, numbers = _of(*row, rank, head_dim, dtype=dtype), _of(*row, rank, dtype=jnp.float32)
    return Moments(vectors, vectors, numbers, numbers if dtype == jnp.int8 else None)


def _selection(heads: Heads) -> dict[str, Any]:
    """The four ops that find tokens, for rows of few and of many clusters and candidates."""
    row, floats, layer = (BATCH, HEADS), jnp.float32, _of()
    query = _of(*row, heads.group, heads.head_dim, dtype=heads.dtype)
    offsets = _of(LAYERS, *row, CLUSTERS + 1)
    logits, logsumexp = _of(*row, heads.group, CLUSTERS, dtype=floats), _of(*row, heads.group)
    logsumexp = _of(*logsumexp.shape, dtype=floats)
    centroids = _of(LAYERS, *row, CLUSTERS, heads.head_dim, dtype=heads.dtype)
    most = TOKENS // 4
    candidates = Candidates(
        _of(*row, CLUSTERS, dtype=jnp.bool_),
        _of(*row, CLUSTERS),
        _of(*row, CLUSTERS + 1),
        _of(*row, most // 32),
    )
    codes = TokenCodes(
        _of(LAYERS, *row, TOKENS, -(-heads.head_dim // 32), dtype=jnp.uint32),
        _of(LAYERS, *row, TOKENS, dtype=heads.dtype),
    )
    turned = _of(*query.shape, dtype=floats)
    packed = _query.packed_shapes(*query.shape)
    indexed = IndexedTokens(offsets, _of(LAYERS, *row, TOKENS, dtype=jnp.uint16), _of(BATCH))
    tables = {
        n: jax.eval_shape(lambda n=n: empty_table((LAYERS, *row), TOKENS, n)) for n in (0, SLOTS)
    }
    scored = {"scale": 0.1, "max_candidates": most}
    score = functools.partial(score_tokens.score_tokens, **scored)
    settings = SelectionSettings(RETRIEVED, 8192, 1024)
    select = functools.partial(select_tokens.select_tokens, settings=settings)
    spread = functools.partial(select, config=select_tokens.Config(512, 256, spread=True))
    clusters = functools.partial(select_clusters.select_clusters, max_candidates=most)
    ranked = (logits, logsumexp, offsets, layer, _of(BATCH))
    sizes = {"few": 96, "many": CLUSTERS, "most": 49_152}

    def of_tokens(rotated: Any) -> tuple[Any, ...]:
        scores = ClusterScores(logits, logsumexp, rotated)
        return scores, candidates, offsets, codes, layer

    def of_table(slots: int) -> tuple[Any, ...]:
        log_mass = _of(*row, most, dtype=floats)
        ranked = RankedTokens(log_mass, candidates, _of(BATCH))
        return ranked, indexed, tables[slots], layer, layer

    calls: dict[str, Any] = {
        "score_clusters": (
            functools.partial(score_clusters.score_clusters, scale=0.1, rotated=True),
            (query, centroids, offsets, layer),
            {"score_clusters", "combine_logsumexps"},
        ),
        "score_clusters-moments": (
            lambda *a: score_clusters.score_clusters(
                *a[:-1], scale=0.1, rotated=True, directions=a[-1]
            ),
            (
                *(query, centroids, offsets, layer),
                moments_of(centroids.shape[:-1], 2, heads.head_dim, heads.dtype).directions,
            ),
            {"score_clusters", "combine_logsumexps"},
        ),
        "score_clusters-covariance": (
            lambda *a: score_clusters.score_clusters(
                *a[:-1], scale=0.1, rotated=True, covariance=a[-1]
            ),
            (
                *(query, centroids, offsets, layer),
                _of(LAYERS, *row, 2, heads.head_dim, heads.head_dim, dtype=heads.dtype),
            ),
            {"score_clusters", "combine_logsumexps"},
        ),
        "score_tokens": (score, of_tokens(turned), {"score_tokens"}),
        "score_tokens-no-codes": (
            score,
            (ClusterScores(logits, logsumexp, turned), candidates, offsets, None, layer),
            {"score_tokens"},
        ),
        "select_tokens": (
            select,
            of_table(SLOTS),
            {"estimate_threshold", "list_contenders", "pick_rows", "look_up_rows", "admit_rows"},
        ),
        "select_tokens-no-slots": (select, of_table(0), {"pick_rows"}),
        "select_tokens-spread": (spread, of_table(SLOTS), {"draw_sample", "join_contenders"}),
    }
    if heads.dtype != "float32":
        calls["score_tokens-packed"] = (score, of_tokens(packed), {"score_tokens"})
        calls["score_tokens"][2].add("pack_query")
    for name, size in sizes.items():
        operands = jax.tree.map(
            lambda x, size=size: _of(
                *(size + n - CLUSTERS if n - CLUSTERS in (0, 1) else n for n in x.shape),
                dtype=x.dtype,
            ),
            ranked,
        )
        calls[f"select_clusters-{name}"] = (clusters, operands, {"rank_clusters", "list_clusters"})
    calls["select_clusters-most"][2].update({"bracket_clusters", "split_clusters"})
    deviations = _of(LAYERS, *row, CLUSTERS, dtype=heads.dtype)
    calls["select_clusters-reach"] = (
        lambda reach, *a: clusters(*a, reach=reach),
        (Reach(logsumexp, deviations), *ranked),
        {"rank_clusters", "list_clusters"},
    )
    return calls


def _attention(heads: Heads) -> dict[str, Any]:
    """The ops that attend and merge, and the one that writes rows to the host."""
    row, dtype, d, layer = (LAYERS, BATCH, HEADS), heads.dtype, heads.head_dim, _of()
    own = (BATCH, HEADS)
    query = _of(*own, heads.group, d, dtype=dtype)
    arrays = {
        "query": query,
        "sink": _of(*row, 4, 2, d, dtype=dtype),
        "sink_tokens": _of(BATCH),
        "window": _of(*row, WINDOW, 2, d, dtype=dtype),
        "window_tokens": _of(BATCH),
        "store": _of(*row, TOKENS, 2, d, dtype=dtype),
        "cache_rows": _of(*row, SLOTS, 2, d, dtype=dtype),
        "tokens": _of(*own, RETRIEVED),
        "slots": _of(*own, RETRIEVED),
        "hit": _of(*own, RETRIEVED, dtype=jnp.bool_),
        "logits": _of(*own, heads.group, CLUSTERS, dtype=jnp.float32),
        "value_means": _of(*row, CLUSTERS, d, dtype=dtype),
        "offsets": _of(*row, CLUSTERS + 1),
        "remaining": _of(*own, CLUSTERS),
    }
    small = arrays | {"store": _of(*row, 4096, 2, d, dtype=dtype)}
    no_slots = arrays | {"cache_rows": _of(*row, 0, 2, d, dtype=dtype)}

    def attend(arrays: Any, layer: Any, host: bool = False) -> Any:
        if host:
            arrays = arrays | {"store": jax.device_put(arrays["store"], HOST)}
        return attend_zones.attend_zones(*zone_operands(arrays), layer, scale=0.1)

    def append(store: Any, *others: Any) -> Any:
        return append_rows.append_rows(Rows(jax.device_put(store, HOST)), *others)

    cache = Rows(_of(*row, TOKENS, d, dtype=dtype))
    rounded = Rows(_of(*row, TOKENS, d, dtype=jnp.int8), _of(*row, TOKENS, dtype=jnp.float32))
    state = (81, *own, heads.group)
    merge_states = attend_dense.merging.merge_states
    levels = small | {
        name: _of(*small[of].shape[: 6 - cut], dtype=kind)
        for of in ("store", "cache_rows")
        for name, cut, kind in (
            (of, 0, jnp.int8), (of.replace("_rows", "") + "_scales", 1, jnp.float32)
        )
    }  # fmt: skip
    attend_all = functools.partial(attend_dense.attend_dense, scale=0.1)
    clusters = (*row, CLUSTERS)

    def with_moments(arrays: Any, rank: int, dtype: Any) -> Any:
        products = _of(*arrays["logits"].shape, rank, dtype=jnp.float32)
        moments = moments_of(clusters, rank, d, dtype)
        return arrays | {"correction": Correction(moments, products, arrays["tokens"])}

    def with_pooled(arrays: Any) -> Any:
        products = _of(*query.shape[:3], 2, d, dtype=jnp.float32)
        return arrays | {"pooled": Pooled(products, _of(*clusters, dtype=dtype))}

    corrected = {"attend_zones", "find_runs", "find_remains", "attend_corrected"}
    # No float16 holds weights times scales.
    scaled = {} if dtype == "float16" else {
        "attend_dense-levels": (
            attend_all,
            (query, rounded, rounded, _of(BATCH), layer),
            {"attend_dense", "merge_states"},
        )
    } | {
        f"attend_zones-levels-{'host' if host else 'device'}": (
            functools.partial(attend, host=host), (levels, layer), {"attend_zones"}
        )
        for host in (False, True)
    }  # fmt: skip
    if scaled:
        scaled["attend_zones-moments-levels"] = (
            attend,
            (with_moments(levels, 2, jnp.int8), layer),
            corrected,
        )
    return scaled | {
        "attend_zones": (attend, (arrays, layer), {"attend_zones"}),
        "attend_zones-no-slots": (attend, (no_slots, layer), {"attend_zones"}),
        # Small enough that processors choose their parts.
        "attend_zones-host": (
            functools.partial(attend, host=True), (small, layer), {"attend_zones"}
        ),
        "attend_zones-pooled": (attend, (with_pooled(no_slots), layer), {"attend_zones"}),
        "attend_zones-moments": (attend, (with_moments(no_slots, 2, dtype), layer), corrected),
        "attend_zones-moments-host": (
            functools.partial(attend, host=True),
            (with_moments(small, 4, jnp.int8), layer),
            corrected,
        ),
        "attend_dense": (
            attend_all,
            (query, cache, cache, _of(BATCH), layer),
            {"attend_dense", "merge_states"},
        ),
        "merge_states": (
            merge_states,
            (_of(*state, d, dtype=jnp.float32), _of(*state, dtype=jnp.float32)),
            {"merge_states"},
        ),
        "append_rows": (
            append,
            (arrays["store"], _of(HEADS, 1024, 2, d, dtype=dtype), layer, layer, layer),
            {"append_rows"},
        ),
    }  # fmt: skip
