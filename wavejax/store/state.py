"""Wave attention's state, and what a decode step attends to in one layer of it."""

from typing import ClassVar, NamedTuple

from jax import Array

from wavejax._pytree import state as pytree
from wavejax.store.audit import AuditLog
from wavejax.store.index import WaveIndex
from wavejax.store.rows import RowCache, RowStore
from wavejax.store.steady import SteadyZone
from wavejax.store.tolerance import Tolerances


@pytree
class WaveState:
    """The KV cache of all layers and sequences, as a wave index and a wave buffer.

    Attributes:
        index: clusters and codes, by index place.
        store: the indexed tokens' KV rows, by store row.
        cache: lately retrieved KV rows, by slot.
        steady: the first and the last tokens' KV rows, by position.
        step: int32 scalar, decode steps done; the row cache's clock.
        attended: `[batch]` float32, the tokens that dense attention would have read so far, in
            each layer and kv head: what the share of tokens retrieved is a share of.
        audit: true errors of some heads; None without.
        tolerance: each sequence's, and how many heads were within it; None without.
    """

    index: WaveIndex
    store: RowStore
    cache: RowCache
    steady: SteadyZone
    step: Array
    attended: Array
    audit: AuditLog | None = None
    tolerance: Tolerances | None = None

    AXES: ClassVar = {"step": (), "attended": ("sequences",)}


class Selection(NamedTuple):
    """What a decode step attends to in one layer, besides the steady zone.

    Attributes:
        query: `[batch, kv_heads, group, head_dim]`.
        tokens: `[batch, kv_heads, budget]` int32, store rows; as `slots` and `hit`, see
            `pallas_kernels.Retrieved`.
        slots: the slot to read, or to admit the KV row to.
        hit: bool, whether the row cache holds the KV row.
        logits: `[batch, kv_heads, group, clusters]` float32, of the clusters.
        estimated: `[batch, kv_heads, clusters]` int32, members of each cluster to estimate.
        products, clusters: of the moments' directions and of `tokens`, as in
            `pallas_kernels.Correction`; None without moments.
        pooled: as in `pallas_kernels.ClusterScores`; None without a covariance.
    """

    query: Array
    tokens: Array
    slots: Array
    hit: Array
    logits: Array
    estimated: Array
    products: Array | None = None
    clusters: Array | None = None
    pooled: Array | None = None
