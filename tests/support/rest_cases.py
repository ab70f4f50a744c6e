"""Steps whose estimate is corrected by moments: clusters of known members, some retrieved."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.rounding import quantise
from pallas_kernels.types import MASKED, NO_ID, Correction, Moments

LAYERS, BATCH, HEADS, LAYER = 2, 3, 2, 1
ROOM, SLOTS, TOKENS = 180, 150, 190
# Members of each cluster: of none, of one, and of more than a tile holds; in another order in each
# row. The last of the batch has no clusters.
SIZES = (1, 40, 0, 7, 2, 12, 1, 9, 3, 0, 21, 5, 6, 8, 4, 11, 2, 30, 3, 5)
CLUSTERS = len(SIZES) + 17
FLOATS = ("query", "sink", "window", "store", "cache_rows", "value_means")


def rest_case(
    seed, group, head_dim, *, rank=2, dtype="float32", moments="float32", cached=True, share=0.4
):
    """A step by name as `zone_operands` takes it; what must not be read is NaN.

    Some share of the members is retrieved. Unless that is 0 or 1, in each row one cluster is
    retrieved whole, of one all but one member is, of one none; and of two some members are to be
    left out, or more are said to remain than do.
    """
    rng = np.random.default_rng(seed)
    row = (LAYERS, BATCH, HEADS)
    case = {
        "query": rng.normal(size=(BATCH, HEADS, group, head_dim)),
        "sink": rng.normal(size=(*row, 2, 2, head_dim)),
        "sink_tokens": np.array([2, 1, 2]),
        "window": rng.normal(size=(*row, 5, 2, head_dim)),
        "window_tokens": np.array([5, 0, 1]),
        "store": np.full((*row, TOKENS, 2, head_dim), np.nan),
        "cache_rows": np.full((*row, SLOTS if cached else 0, 2, head_dim), np.nan),
        "tokens": np.full((BATCH, HEADS, ROOM), NO_ID),
        "slots": np.full((BATCH, HEADS, ROOM), NO_ID),
        "hit": np.zeros((BATCH, HEADS, ROOM), bool),
        "logits": np.full((BATCH, HEADS, group, CLUSTERS), MASKED),
        "value_means": np.full((*row, CLUSTERS, head_dim), np.nan),
        "offsets": np.zeros((*row, CLUSTERS + 1), int),
        "remaining": np.zeros((BATCH, HEADS, CLUSTERS), int),
    }
    found = {
        "clusters": np.full((BATCH, HEADS, ROOM), NO_ID),
        "products": np.full((BATCH, HEADS, group, CLUSTERS, rank), np.nan),
        "lambdas": np.full((*row, CLUSTERS, rank), np.nan),
        "weights": np.full((*row, CLUSTERS, rank, head_dim), np.nan),
        "weight_scales": np.full((*row, CLUSTERS, rank), np.nan),
    }
    for b, h in np.ndindex(BATCH, HEADS):
        if b < BATCH - 1:
            _fill_row(rng, case, found, (LAYER, b, h), rank, moments == "int8", share)
        case["store"][LAYER, b, h, 0] = 0  # the reference reads it in place of rows that hit
    dtypes = dict.fromkeys(FLOATS, dtype) | {"hit": bool, "logits": "float32"}
    arrays = {name: jnp.asarray(x, dtypes.get(name, jnp.int32)) for name, x in case.items()}
    vectors = np.where(np.isnan(found["weights"]), 99, found["weights"])
    vectors = jnp.asarray(found["weights"] if moments != "int8" else vectors, moments)
    numbers = {name: jnp.asarray(found[name], jnp.float32) for name in ("lambdas", "weight_scales")}
    scales = numbers["weight_scales"] if moments == "int8" else None
    arrays["correction"] = Correction(
        Moments(vectors, vectors, numbers["lambdas"], scales),
        jnp.asarray(found["products"], jnp.float32),
        jnp.asarray(found["clusters"], jnp.int32),
    )
    return arrays


def in_levels(case):
    """The same step with rows in 8 bits."""
    found = dict(case)
    for name in ("store", "cache_rows"):
        rows = quantise(case[name])
        found |= {name: rows.data, name.replace("_rows", "") + "_scales": rows.scales}
    return found


def _fill_row(rng, case, found, at, rank, levels, share):
    """Clusters in an order of their own, rows of which some are retrieved, and moments."""
    _, b, h = at
    group, head_dim = case["query"].shape[2:]
    sizes = rng.permutation(SIZES)
    edges = np.concatenate([[0], sizes.cumsum()])
    case["offsets"][at] = np.pad(edges, (0, CLUSTERS + 1 - len(edges)), "edge")
    own = np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(TOKENS - 1)[: len(own)] + 1
    centres = rng.normal(size=(len(sizes), 2, head_dim))
    rows = centres[own] + 0.5 * rng.normal(size=(len(own), 2, head_dim))

    picked = rng.random(len(own)) < share
    whole, all_but_one, none = np.flatnonzero(sizes > 6)[:3]
    if 0 < share < 1:
        picked[np.isin(own, [whole, all_but_one])], picked[own == none] = True, False
        picked[edges[all_but_one] + 2] = False
    places = np.flatnonzero(picked)
    # Rows that are not worth reading lie between the others.
    where = np.sort(rng.permutation(ROOM - 3)[: len(places)])
    tokens = order[places]
    case["tokens"][b, h, where], found["clusters"][b, h, where] = tokens, own[places]
    if case["cache_rows"].shape[3]:
        kind = rng.integers(0, 3, len(places))  # a hit, a miss, a miss without a slot
        slots = rng.permutation(SLOTS)[: len(places)]
        case["slots"][b, h, where] = np.where(kind == 2, NO_ID, slots)
        case["hit"][b, h, where] = kind == 0
        case["cache_rows"][at][slots[kind == 0]] = rows[places[kind == 0]]
        case["store"][at][tokens[kind > 0]] = rows[places[kind > 0]]
    else:
        case["store"][at][tokens] = rows[places]

    left = sizes - np.bincount(own[places], minlength=len(sizes))
    remaining = left.copy()
    remaining[whole] = left[whole] + 3
    if share < 1:
        fewer, more = rng.permutation(np.flatnonzero(left > 2))[:2]
        remaining[fewer], remaining[more] = left[fewer] // 2, left[more] + 3
    case["remaining"][b, h, : len(sizes)] = remaining
    used = np.flatnonzero(np.minimum(remaining, left) > 0)
    count = (len(used), rank)
    for j in used:
        case["value_means"][at][j] = rows[own == j, 1].mean(axis=0)
    held = np.flatnonzero(sizes > 0)
    centroids = np.stack([rows[own == j, 0].mean(axis=0) for j in held])
    case["logits"][b, h][:, held] = 0.2 * case["query"][b, h] @ centroids.T
    found["products"][b, h][:, used] = rng.normal(size=(group, *count))
    # Of some clusters the second order is more than it may be.
    found["lambdas"][at][used] = rng.gamma(1.0, size=count)
    vectors = 0.3 * rng.normal(size=(*count, head_dim))
    scales = rng.uniform(0.5, 1, count) * 1e-2
    found["weight_scales"][at][used] = scales
    found["weights"][at][used] = np.round(vectors / scales[..., None]) if levels else vectors
