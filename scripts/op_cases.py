"""The ops of a decode step as `gpu_timing` times them, and the bytes that each must move."""

import argparse
import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels as ops
from pallas_kernels.dispatch import Implementation
from pallas_kernels.shapes import StepShape
from pallas_kernels.testing import StepInputs, make_step
from pallas_kernels.types import (
    ClusterScores,
    Estimate,
    IndexedTokens,
    Picks,
    RankedTokens,
    Rows,
    RowTable,
    SteadyRows,
    StoredRows,
    TokenCodes,
)

STEP_OPS = (
    "score_clusters",
    "select_clusters",
    "score_tokens",
    "select_tokens",
    "attend_zones",
    "merge_states",
)

# What the step is compared with; asked for by name only, as it needs a second copy of the rows.
OTHER_OPS = ("attend_dense",)

# More than an H200's 60 MB of cache: a layer's data must be gone before its turn comes again.
COLD_BYTES = 120e6

# run(op, *operands, **keywords): an op's result, by whichever implementation and config.
Run = Callable[..., Any]


@dataclass
class OpCase:
    """An op at a shape: what `gpu_timing.time_calls` takes, and the bytes that a call must move."""

    call: Callable[[Any, Any, Any], tuple[Any, Any]]
    operands: Any
    links: tuple[Any, ...]
    bytes: float
    state: Any = ()


def names_from(
    parser: argparse.ArgumentParser, option: str, text: str, known: Collection[str]
) -> list[str]:
    """Return the names between an option's commas; an unknown one ends the script."""
    names = text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{option}: {name!r} is none of {', '.join(known)}")
    return names


def by_api(implementation: Implementation | None) -> Run:
    """Run ops by their public functions."""

    def run(op: str, *operands: Any, **keywords: Any) -> Any:
        return getattr(ops, op)(*operands, **keywords, implementation=implementation)

    return run


def layers_for(shape: StepShape) -> int:
    """Layers to go round so that no layer's data are still in the GPU's cache."""
    codes = shape.rows * shape.candidates * (4 * -(-shape.head_dim // 32) + 2)
    return min(16, max(2, math.ceil(COLD_BYTES / codes))) if shape.tokens > 4096 else 2


class StepBench:
    """A step's inputs at a shape, and what the ops make of them in turn.

    All layers share their clusters' sizes, so that what one op makes of the first layer is valid
    for the next op in every layer.
    """

    def __init__(self, shape: StepShape, run: Run, *, layers: int | None = None, seed: int = 0):
        self.shape, self.run = shape, run
        inputs = make_step(shape, seed, layers=layers or layers_for(shape))
        shared = jnp.broadcast_to(inputs.offsets[:1], inputs.offsets.shape)
        self.inputs: StepInputs = inputs._replace(offsets=jnp.array(shared))
        self.links = tuple(jnp.int32(i) for i in range(inputs.offsets.shape[0]))
        self._made: dict[str, Any] = {}

    def made(self, op: str) -> Any:
        """Return an op's result in the first layer, by "xla" if the other way fails."""
        if op not in self._made:
            case = self.case(op)

            def once(run: Run) -> Any:
                call = jax.jit(self.case(op, run).call)
                return call(jnp.int32(0), case.operands, case.state)[0]

            try:
                self._made[op] = jax.block_until_ready(once(self.run))
            except Exception:
                self._made[op] = once(by_api("xla"))
        return self._made[op]

    def case(self, op: str, run: Run | None = None) -> OpCase:
        """Return the op's case; it may need the results of the ops before it."""
        made: OpCase = getattr(self, f"_{op}")(run or self.run)
        return made

    def _score_clusters(self, run: Run) -> OpCase:
        x, scale = self.inputs, self.shape.scale

        def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
            return run("score_clusters", *operands, layer, scale=scale), state

        shape, rows = self.shape, self.shape.rows
        read = rows * shape.clusters * shape.head_dim * x.centroids.dtype.itemsize
        written = 4 * rows * shape.group * shape.cluster_room
        return OpCase(call, (x.query, x.centroids, x.offsets), self.links, read + written)

    def _select_clusters(self, run: Run) -> OpCase:
        x, scores, shape = self.inputs, self.made("score_clusters"), self.shape

        def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
            logits, logsumexp, offsets, budget = operands
            most = shape.max_candidates
            found = run(
                *("select_clusters", logits, logsumexp, offsets, layer, budget), max_candidates=most
            )
            return found, state

        moved = shape.rows * shape.cluster_room * (4 * shape.group + 4 + 1 + 4 + 4)
        operands = (scores.logits, scores.logsumexp, x.offsets, x.candidate_budget)
        return OpCase(call, operands, self.links, moved)

    def _score_tokens(self, run: Run) -> OpCase:
        x, scores, shape = self.inputs, self.made("score_clusters"), self.shape

        def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
            query, scored, *rest = operands
            scored = scored._replace(rotated=anew(query, layer))
            sizes = {"scale": shape.scale, "max_candidates": shape.max_candidates}
            return run("score_tokens", scored, *rest, layer, **sizes), state

        codes = TokenCodes(x.codes, x.scales)
        scored = ClusterScores(scores.logits, scores.logsumexp)
        operands = (x.rotated_query, scored, self.made("select_clusters"), x.offsets, codes)
        each = 4 * x.codes.shape[-1] + x.scales.dtype.itemsize + 4
        return OpCase(call, operands, self.links, shape.rows * shape.candidates * each)

    def _select_tokens(self, run: Run) -> OpCase:
        x, shape = self.inputs, self.shape

        def call(layer: Array, operands: Any, table: RowTable) -> tuple[Any, Any]:
            ranked, indexed, step = operands
            result = run(
                "select_tokens", ranked, indexed, table, layer, step, settings=shape.selection
            )
            kept = (result.tokens, result.slots, result.hit, result.remaining)
            return (*kept, result.hits, result.misses), result.table

        made = self.made("score_tokens"), self.made("select_clusters")
        operands = (RankedTokens(*made, x.retrieved_budget), indexed_of(x), x.step)
        moved = shape.rows * (4 * shape.candidates + 8 * shape.cluster_room + 8 * shape.slots)
        return OpCase(call, operands, self.links, moved, copied(x.table))

    def _attend_zones(self, run: Run) -> OpCase:
        x, shape = self.inputs, self.shape

        def call(layer: Array, operands: Any, cache_rows: Array) -> tuple[Any, Any]:
            (query, steady, store), (*picks, estimate) = operands
            stored = StoredRows(Rows(store), Rows(cache_rows))
            grouped = query, steady, stored, Picks(*picks), estimate
            result = run("attend_zones", *grouped, layer, scale=shape.scale)
            return (result.outputs, result.logsumexps), result.cache_rows.data

        before = (x.query, steady_of(x), x.store)
        logits = self.made("score_clusters").logits
        estimate = Estimate(logits, x.value_means, x.offsets, x.remaining)
        after = (x.tokens, x.slots, x.hit, estimate)
        return OpCase(call, (before, after), self.links, self.zone_bytes(), jnp.copy(x.cache_rows))

    def _merge_states(self, run: Run) -> OpCase:
        outputs, logsumexps = self.made("attend_zones")

        def call(logsumexps: Array, outputs: Any, state: Any) -> tuple[Any, Any]:
            return run("merge_states", outputs, logsumexps), state

        moved = outputs.nbytes + logsumexps.nbytes + outputs[0].nbytes
        return OpCase(call, outputs, (logsumexps,), moved)

    @functools.cached_property
    def _caches(self) -> tuple[Rows, Rows]:
        """Keys and values of two layers, as full attention keeps them."""
        keys, values = (Rows(jnp.copy(self.inputs.store[:2, ..., i, :])) for i in (0, 1))
        return keys, values

    def _attend_dense(self, run: Run) -> OpCase:
        x, shape = self.inputs, self.shape
        keys, values = self._caches

        def call(layer: Array, operands: Any, state: Any) -> tuple[Any, Any]:
            return run("attend_dense", *operands, layer, scale=shape.scale), state

        lengths = jnp.full(shape.batch, shape.tokens, jnp.int32)
        layers = keys.shape[0]
        moved = (keys.data.nbytes + values.data.nbytes) / layers
        return OpCase(call, (x.query, keys, values, lengths), self.links[:layers], moved)

    def zone_bytes(self) -> float:
        """Return what `attend_zones` must read: mean values of clusters in use, and rows."""
        x, shape = self.inputs, self.shape
        row = 2 * shape.head_dim * x.store.dtype.itemsize
        means = shape.rows * shape.clusters * shape.head_dim * x.value_means.dtype.itemsize
        steady = int(np.sum(np.asarray(x.sink_tokens) + np.asarray(x.window_tokens)))
        retrieved = int(np.sum(np.asarray(x.retrieved_budget))) * shape.kv_heads
        return float(means + row * (retrieved + steady * shape.kv_heads))


def steady_of(x: StepInputs) -> SteadyRows:
    """Group the steady zone."""
    return SteadyRows(x.sink, x.sink_tokens, x.window, x.window_tokens)


def indexed_of(x: StepInputs) -> IndexedTokens:
    """Group what says which token stands where."""
    return IndexedTokens(x.offsets, x.token_ids, x.prompt_tokens)


def anew(query: Array, layer: Array) -> Array:
    """Return the query as this layer's own: else XLA rotates it once for all of a chain."""
    return jax.lax.optimization_barrier((query, layer))[0]


def copied(tree: Any) -> Any:
    """Return a state that may be donated while the inputs stay."""
    return jax.tree.map(jnp.copy, tree)
