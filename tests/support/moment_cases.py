"""Clusters of known members with moments, for `attend_zones`, and what is true of them."""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from pallas_kernels.build_moments import in_int8
from pallas_kernels.types import (
    NO_ID,
    Clusters,
    Correction,
    Estimate,
    Picks,
    Rows,
    SteadyRows,
    StoredRows,
)

BATCH, HEADS, GROUP, HEAD_DIM, SCALE = 2, 2, 3, 8, 0.35
# Members of the clusters of each sequence, in rising order of their store rows; room for one more.
SIZES = ((12, 1, 20, 7, 24), (30, 2, 9, 0, 0))
CLUSTERS, TOKENS = 6, sum(SIZES[0])


build = jax.jit(ops.build_moments, static_argnames="rank")
build_spread = jax.jit(ops.build_spread)
attend = jax.jit(ops.attend_zones, static_argnames="scale")


def members_of(b):
    ends = np.cumsum(SIZES[b])
    return [np.arange(end - size, end) for size, end in zip(SIZES[b], ends, strict=True)]


class Case:
    """Clusters of a layer, moments of rank head_dim, and rows to retrieve of them."""

    def __init__(
        self, seed, spread=0.5, rank=HEAD_DIM, picked=0.3, eight_bits=False, kind="random"
    ):
        rng = np.random.default_rng(seed)
        shape = (1, BATCH, HEADS, TOKENS, 2, HEAD_DIM)
        centres = rng.normal(size=(1, BATCH, HEADS, CLUSTERS, 2, HEAD_DIM))
        own = np.zeros((BATCH, TOKENS), int)
        for b in range(BATCH):
            for j, rows in enumerate(members_of(b)):
                own[b, rows] = j
        self.own = own
        residuals = rng.normal(size=shape)
        self.query = 2 * rng.normal(size=(BATCH, HEADS, GROUP, HEAD_DIM)).astype(np.float32)
        if kind != "random":
            # All along one query: as far as a product can be, for keys of their length.
            along = self.query[:, :, :1] / np.linalg.norm(self.query[:, :, :1], axis=-1)[..., None]
            tail = rng.standard_cauchy if kind == "heavy" else rng.normal
            length = np.clip(tail(size=(BATCH, HEADS, TOKENS, 1)), -20, 20)
            residuals[0, ..., 0, :] = length * along
        residuals[..., 1, :] += residuals[..., 0, :] @ rng.normal(size=(HEAD_DIM, HEAD_DIM))
        self.store = np.stack([centres[:, b][:, :, own[b]] for b in range(BATCH)], axis=1)
        self.store = (self.store + spread * residuals).astype(np.float32)
        for b in range(BATCH):
            self.store[:, b, :, sum(SIZES[b]) :] = np.nan
        self.picked = rng.random((BATCH, HEADS, TOKENS)) < picked
        for b in range(BATCH):
            self.picked[b, :, sum(SIZES[b]) :] = False
        self.rank, self.eight_bits = rank, eight_bits

    def operands(self):
        sizes = np.zeros((BATCH, CLUSTERS), int)
        for b in range(BATCH):
            sizes[b, : len(SIZES[b])] = SIZES[b]
        offsets = np.concatenate([np.zeros((BATCH, 1), int), sizes.cumsum(-1)], -1)
        offsets = jnp.asarray(np.repeat(offsets[None, :, None], HEADS, 2), jnp.int32)
        keys, values = (jnp.asarray(self.store[0, ..., i, :]) for i in (0, 1))

        def means(x):
            found = np.full((BATCH, HEADS, CLUSTERS, HEAD_DIM), np.nan, np.float32)
            for b in range(BATCH):
                for j, rows in enumerate(members_of(b)):
                    if len(rows):
                        found[b, :, j] = np.asarray(x, np.float64)[b, :, rows].mean(0)
            return jnp.asarray(found)

        centroids, value_means = means(keys), means(values)
        order = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, HEADS, TOKENS))
        clusters = Clusters(centroids, value_means, offsets[0], order)
        moments = build(keys, values, clusters, rank=self.rank)
        moments = jax.tree.map(lambda x: x[None], in_int8(moments) if self.eight_bits else moments)
        room = TOKENS + 2  # one for all cases, so that little is compiled
        tokens = np.full((BATCH, HEADS, room), NO_ID, np.int32)
        own = np.full((BATCH, HEADS, room), NO_ID, np.int32)
        remaining = np.repeat(sizes[:, None], HEADS, 1)
        for b in range(BATCH):
            for h in range(HEADS):
                rows = np.flatnonzero(self.picked[b, h])
                # One that is not worth reading lies between the others.
                at = [*range(min(2, len(rows))), *range(3, len(rows) + 1)]
                tokens[b, h, at], own[b, h, at] = rows, self.own[b, rows]
                np.subtract.at(remaining[b, h], self.own[b, rows], 1)
        query = jnp.asarray(self.query)
        scores = ops.score_clusters(
            query, centroids[None], offsets, 0, scale=SCALE, directions=moments.directions
        )
        spread = jax.tree.map(lambda x: x[None], build_spread(keys, values, clusters))
        correction = Correction(moments, scores.products, jnp.asarray(own), spread)
        nothing = jnp.full((1, BATCH, HEADS, 1, 2, HEAD_DIM), jnp.nan), jnp.zeros(BATCH, jnp.int32)
        steady = SteadyRows(*nothing, *nothing)
        return (
            query,
            steady,
            StoredRows(
                Rows(jnp.asarray(self.store)), Rows(jnp.zeros((1, BATCH, HEADS, 0, 2, HEAD_DIM)))
            ),
            Picks(
                jnp.asarray(tokens), jnp.full(tokens.shape, NO_ID), jnp.zeros(tokens.shape, bool)
            ),
            Estimate(
                scores.logits,
                value_means[None],
                offsets,
                jnp.asarray(remaining, jnp.int32),
                correction,
            ),
        )

    def estimated(self, operands=None):
        """Output and mass of what remains."""
        operands = self.operands() if operands is None else operands
        found = attend(*operands, 0, scale=SCALE)
        return np.asarray(found.outputs[2], np.float64), np.asarray(found.logsumexps[2], np.float64)

    def heads(self):
        for b, h, g in np.ndindex(BATCH, HEADS, GROUP):
            rows = self.store[0, b, h].astype(np.float64)
            yield (b, h, g), SCALE * self.query[b, h, g].astype(np.float64), rows

    def second_order(self, at, query, rows):
        """Mass and weighted values of what remains by the formulas, nothing truncated."""
        mass, total = 0.0, np.zeros(HEAD_DIM)
        b, h, _ = at
        for own in members_of(b):
            left = own[~self.picked[b, h, own]]
            if not len(left):
                continue
            key, value = (rows[left, i].mean(0) for i in (0, 1))
            d, e = (rows[own, i] - rows[own, i].mean(0) for i in (0, 1))
            x, n = d @ query, len(own)
            share = 0 if n == 1 else (1 - 1 / len(left)) / (1 - 1 / n)
            more = min(share * (x**2).mean() / 2, 2)
            logit = key @ query
            if 2 * len(left) < n:  # no nearer than the whole
                logit = min(logit, rows[own, 0].mean(0) @ query)
            weight = len(left) * np.exp(logit)
            mass += weight * (1 + more)
            total += weight * ((1 + more) * value + share * (e * x[:, None]).mean(0))
        return mass, total

    def true(self, at, query, rows):
        """Mass and weighted values of what remains."""
        left = ~self.picked[at[:2]] & (np.arange(TOKENS) < sum(SIZES[at[0]]))
        weights = np.exp(rows[left, 0] @ query)
        return weights.sum(), weights @ rows[left, 1]
