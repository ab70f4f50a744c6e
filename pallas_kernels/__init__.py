"""The ops of a decode step over a clustered KV cache, and of the plain one it is compared with.

A decode step's ops, in their order:

- `score_clusters`: the query against every cluster's centroid, `ClusterScores`; from the kernel the
  rotated query too, a `PackedQuery`.
- `select_clusters`: the clusters whose tokens are looked at one by one, `Candidates`; by their
  means, or by what their members might `Reach`.
- `score_tokens`: the candidates' tokens by their one-bit codes.
- `select_tokens`: the best of the `RankedTokens`, `Retrieved`; updates the row cache's `RowTable`.
  Which `IndexedTokens` they are tells the store's rows; `SelectionSettings` are static.
- `attend_zones`: attention to the steady, retrieved and estimated tokens, `ZoneStates`. It takes
  `SteadyRows`, `StoredRows` (a store and a row cache of `Rows`), `Picks` and an `Estimate`, which a
  `Correction` makes better, or what is `Pooled` of all clusters.
- `merge_states`: attention over disjoint sets of tokens to attention over their union.
- `attend_dense`: attention to all tokens, what the others together are compared with.

A product of the layers around attention:

- `multiply_levels`: a few tokens times a matrix in 8 or 4 bits, `Levels`.

Ops that make what a decode step reads:

- `build_clusters`: a segment's tokens by their keys, `Clusters`.
- `build_moments`: how values vary with keys within clusters, `Moments`.
- `build_spread`: how far the members of clusters lie from their means, `Spread`; `attend_zones`
  makes `ZoneBounds` of it.
- `encode_tokens`: one bit a dimension of each key, `TokenCodes`.
- `append_rows`: new rows into the row store, `Rows` too.

What reads more text into a sequence that is held:

- `attend_appended`: attention of some tokens to all that it holds, `KeptRows`, and to themselves.

`use_implementation` chooses between plain JAX and the kernels for what is traced inside. So does
the environment variable `WAVEJAX_IMPLEMENTATION` for a process, and each op's own argument
`implementation`, an `Implementation`. `explain` tells what each op took and why: an `Explanation`,
one `Choice` each. `forget` empties it. A `FallbackWarning` says that an op runs in plain JAX on a
GPU.

`MASKED` is the logit of what is not there, `NO_ID` the token, cluster or slot that is none, `EMPTY`
the same in a row table.

Each op is a folder: `__init__.py` (its signature), `reference.py` (its meaning, in plain JAX) and
`triton.py` (its kernels for GPUs); two have `tpu.py` (a kernel for TPUs). `types.py` has what ops
hand to each other. `shapes.py` names the real shapes that tests and benchmarks share; `testing`
makes inputs of them.
"""

from pallas_kernels.append_rows import append_rows
from pallas_kernels.attend_appended import attend_appended
from pallas_kernels.attend_dense import attend_dense
from pallas_kernels.attend_zones import attend_zones
from pallas_kernels.build_clusters import build_clusters
from pallas_kernels.build_moments import build_moments
from pallas_kernels.build_spread import build_spread
from pallas_kernels.dispatch import Implementation, explain, forget, use_implementation
from pallas_kernels.encode_tokens import encode_tokens
from pallas_kernels.explanation import Choice, Explanation, FallbackWarning
from pallas_kernels.merge_states import merge_states
from pallas_kernels.multiply_levels import multiply_levels
from pallas_kernels.score_clusters import score_clusters
from pallas_kernels.score_tokens import score_tokens
from pallas_kernels.select_clusters import select_clusters
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.types import (
    EMPTY,
    MASKED,
    NO_ID,
    Candidates,
    Clusters,
    ClusterScores,
    Correction,
    Estimate,
    IndexedTokens,
    KeptRows,
    Levels,
    Moments,
    PackedQuery,
    Picks,
    Pooled,
    RankedTokens,
    Reach,
    Retrieved,
    Rows,
    RowTable,
    SelectionSettings,
    Spread,
    SteadyRows,
    StoredRows,
    TokenCodes,
    ZoneBounds,
    ZoneStates,
)

__all__ = [
    "EMPTY",
    "MASKED",
    "NO_ID",
    "Candidates",
    "Choice",
    "ClusterScores",
    "Clusters",
    "Correction",
    "Estimate",
    "Explanation",
    "FallbackWarning",
    "Implementation",
    "IndexedTokens",
    "KeptRows",
    "Levels",
    "Moments",
    "PackedQuery",
    "Picks",
    "Pooled",
    "RankedTokens",
    "Reach",
    "Retrieved",
    "RowTable",
    "Rows",
    "SelectionSettings",
    "Spread",
    "SteadyRows",
    "StoredRows",
    "TokenCodes",
    "ZoneBounds",
    "ZoneStates",
    "append_rows",
    "attend_appended",
    "attend_dense",
    "attend_zones",
    "build_clusters",
    "build_moments",
    "build_spread",
    "encode_tokens",
    "explain",
    "forget",
    "merge_states",
    "multiply_levels",
    "score_clusters",
    "score_tokens",
    "select_clusters",
    "select_tokens",
    "use_implementation",
]
