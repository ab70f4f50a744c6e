"""`attend_zones` as one Pallas (Triton) kernel: all three zones in one launch."""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas, _tuning
from pallas_kernels._numerics import MASKED, NO_ID
from pallas_kernels.attend_zones.reference import ZoneStates

State = tuple[Array, Array, Array]

LOG2_E = math.log2(math.e)

# An H200's 132 processors hold about four programs each. Twice as many even out what they take;
# but a program of less than four tiles would spend its time on starting.
PROGRAMS = 8 * 132
LEAST_TILES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut. Programs of a zone take its tiles in turn, so each has as many.

    Attributes:
        retrieved_splits, estimated_splits, steady_splits: programs a row (a sequence's kv head).
        retrieved_tile, cluster_tile, steady_tile: rows of keys and values, or clusters, that a
            program reads at once.
        num_warps, num_stages: see Triton. The loop over the tiles is pipelined.
    """

    retrieved_splits: int
    estimated_splits: int
    steady_splits: int
    retrieved_tile: int = 16
    cluster_tile: int = 64
    steady_tile: int = 16
    num_warps: int = 4
    num_stages: int = 3


def heuristic(
    rows: int, head_dim: int, itemsize: int, retrieved: int, clusters: int, window: int
) -> Config:
    """A config that gives each program about as many tiles, and each processor a few programs.

    Args:
        rows: sequences times kv heads.
        head_dim, itemsize: of the stored rows and value sums.
        retrieved, clusters, window: the capacities of a row's lists.
    """
    row_bytes = _pallas.tile(head_dim) * itemsize
    # With larger tiles the programs take more than 128 registers a thread, and fewer fit.
    row_tile = _pallas.DOT_TILE
    cluster_tile = max(min(16384 // row_bytes, 64), _pallas.DOT_TILE)
    tiles = (retrieved / row_tile, clusters / cluster_tile, window / row_tile)
    # What is retrieved comes from all over the store and the cache, and takes longer.
    work = (1.5 * tiles[0], tiles[1], tiles[2])
    splits = [
        max(1, min(round(PROGRAMS / rows * own / sum(work)), math.ceil(most / LEAST_TILES)))
        for own, most in zip(work, tiles, strict=True)
    ]
    return Config(
        splits[0],
        splits[1],
        splits[2],
        retrieved_tile=row_tile,
        cluster_tile=cluster_tile,
        steady_tile=row_tile,
        num_warps=4 if row_bytes <= 256 else 8,
    )


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matrix product in float32, of float32 without rounding to fewer bits."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=_pallas.precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _absorb(
    state: State,
    exponents: Array,
    valid: Array,
    values: list[Array],
    count: Array | None = None,
    mean: Array | None = None,
) -> State:
    """Takes `[n]` more elements into a running softmax.

    Args:
        state: output `[g, d]`, peak `[g]`, total `[g]`, float32.
        exponents: `[g, n]` float32 logits, of base 2.
        valid: `[n]` bool.
        values: `[n, d]`, whose sum they are; finite also where they are not valid.
        count: `[n]` float32, how often each element counts; None for once.
        mean: `[n]` float32, what times `values` makes a value that often.
    """
    output, peak, total = state
    exponents = jnp.where(valid[None, :], exponents, MASKED)
    higher = jnp.maximum(peak, jnp.max(exponents, axis=1))
    weights = jnp.where(valid[None, :], jnp.exp2(exponents - higher[:, None]), 0.0)
    shrink = jnp.exp2(peak - higher)
    counted = weights if count is None else weights * count[None, :]
    total = total * shrink + jnp.sum(counted, axis=1)
    weights = weights if mean is None else weights * mean[None, :]
    output = output * shrink[:, None]
    for tile in values:
        output += _dot(weights.astype(tile.dtype), tile, (1, 0))
    return output, higher, total


class _Refs(NamedTuple):
    """The kernel's operands and results, in order."""

    query: Any
    sink: Any
    sink_tokens: Any
    window: Any
    window_tokens: Any
    store: Any
    cache_before: Any
    tokens: Any
    slots: Any
    hit: Any
    logits: Any
    value_sums: Any
    offsets: Any
    remaining: Any
    layer: Any
    outputs: Any
    logsumexps: Any
    cache: Any


class _Program:
    """One program: its part of one zone of one row."""

    def __init__(self, refs: _Refs, config: Config, with_sink: bool, scale: float) -> None:
        self.refs, self.config, self.with_sink, self.scale = refs, config, with_sink, scale
        batch, kv_heads, group, head_dim = refs.query.shape
        self.part = pl.program_id(0) // (batch * kv_heads)
        row = pl.program_id(0) % (batch * kv_heads)
        self.b, self.h = row // kv_heads, row % kv_heads
        self.row = (refs.layer[...], self.b, self.h)
        self.d = jnp.arange(_pallas.tile(head_dim))[None, :]
        self.g = jnp.arange(_pallas.MAX_GROUP)
        self.head_dim = head_dim
        self.in_group = self.g < group
        self.start = (
            jnp.zeros((_pallas.MAX_GROUP, self.d.size), jnp.float32),
            jnp.full((_pallas.MAX_GROUP,), MASKED, jnp.float32),
            jnp.zeros((_pallas.MAX_GROUP,), jnp.float32),
        )

    def run(self) -> None:
        config, part = self.config, self.part
        # What is read from the store may take the longest, so these programs come first.
        estimated = config.retrieved_splits
        steady = estimated + config.estimated_splits
        pl.when(part < estimated)(lambda: self.retrieved(part))
        pl.when((part >= estimated) & (part < steady))(lambda: self.estimated(part - estimated))
        pl.when(part >= steady)(lambda: self.steady(part - steady))

    def retrieved(self, split: Array) -> None:
        refs, splits, size = self.refs, self.config.retrieved_splits, self.config.retrieved_tile
        b, h, room = self.b, self.h, refs.tokens.shape[2]
        query = self.load_query()
        # The list is packed: a tile whose first place is taken has rows, the others have none.
        starts = jnp.arange(_pallas.tile(pl.cdiv(room, size))) * size
        firsts = plt.load(refs.tokens.at[b, h, starts], mask=starts < room, other=NO_ID)
        trips = _trips(split, splits, _count(firsts != NO_ID))

        def step(i: Array, state: State) -> State:
            at = (split + i * splits) * size + jnp.arange(size)
            token = plt.load(refs.tokens.at[b, h, at], mask=at < room, other=NO_ID)
            slot = plt.load(refs.slots.at[b, h, at], mask=at < room, other=NO_ID)
            hit = plt.load(refs.hit.at[b, h, at], mask=at < room, other=False)
            valid = token != NO_ID
            hit, missed = hit & valid, valid & ~hit
            cached = self.load_rows(refs.cache, slot, hit)
            stored = self.load_rows(refs.store, token, missed)
            # What is admitted in a step is not read as a hit in it, so the order does not matter.
            admitted = self.of_rows(missed & (slot != NO_ID))
            for kv, vectors in enumerate(stored):
                into = refs.cache.at[*self.row, slot[:, None], kv, self.d]
                plt.store(into, vectors, mask=admitted)
            return self.attend(state, query, [cached, stored], valid)

        self.finish(lax.fori_loop(0, trips, step, self.start))

    def estimated(self, split: Array) -> None:
        refs, splits, size = self.refs, self.config.estimated_splits, self.config.cluster_tile
        b, h, room = self.b, self.h, refs.remaining.shape[2]
        # Clusters not in use come last: a tile that starts at the last offset has none in use.
        starts = jnp.arange(_pallas.tile(pl.cdiv(room, size))) * size
        firsts = plt.load(refs.offsets.at[*self.row, starts], mask=starts < room, other=NO_ID)
        trips = _trips(split, splits, _count(firsts < refs.offsets[*self.row, room]))

        def step(i: Array, state: State) -> State:
            at = (split + i * splits) * size + jnp.arange(size)
            inside = at < room
            count = plt.load(refs.remaining.at[b, h, at], mask=inside, other=0)
            low = plt.load(refs.offsets.at[*self.row, at], mask=inside, other=0)
            high = plt.load(refs.offsets.at[*self.row, at + 1], mask=inside, other=0)
            logits = plt.load(
                refs.logits.at[b, h, self.g[:, None], at[None, :]],
                mask=self.in_group[:, None] & inside[None, :],
                other=0,
            )
            value_sums = plt.load(
                refs.value_sums.at[*self.row, at[:, None], self.d],
                mask=self.of_rows((count > 0) & (high > low)),
                other=0,
            )
            members = jnp.maximum(high - low, 1).astype(jnp.float32)
            weight = count.astype(jnp.float32)
            return _absorb(
                state, LOG2_E * logits, count > 0, [value_sums], weight, weight / members
            )

        self.finish(lax.fori_loop(0, trips, step, self.start))

    def steady(self, split: Array) -> None:
        refs, splits, size = self.refs, self.config.steady_splits, self.config.steady_tile
        query, state = self.load_query(), self.start
        zones = [(refs.window, refs.window_tokens)]
        if self.with_sink:
            zones.append((refs.sink, refs.sink_tokens))
        for rows, tokens in zones:
            count = tokens[self.b]

            def step(i: Array, state: State, rows: Any = rows, count: Array = count) -> State:
                at = (split + i * splits) * size + jnp.arange(size)
                tile = self.load_rows(rows, at, at < count)
                return self.attend(state, query, [tile], at < count)

            state = lax.fori_loop(0, _trips(split, splits, pl.cdiv(count, size)), step, state)
        self.finish(state)

    def of_rows(self, valid: Array) -> Array:
        """What of vectors `[n, d]` is to be read or written, if `[n]` of them are."""
        return valid[:, None] & (self.d < self.head_dim)

    def load_query(self) -> Array:
        """`[g, d]`, zero outside the group and the head."""
        at = self.refs.query.at[self.b, self.h, self.g[:, None], self.d]
        return plt.load(at, mask=self.of_rows(self.in_group), other=0)

    def load_rows(self, rows: Any, places: Array, valid: Array) -> list[Array]:
        """Keys and values `[n, d]` of the row's `[n]` places, zero where not valid."""
        mask = self.of_rows(valid)
        return [
            plt.load(rows.at[*self.row, places[:, None], kv, self.d], mask=mask, other=0)
            for kv in (0, 1)
        ]

    def attend(self, state: State, query: Array, tiles: list[list[Array]], valid: Array) -> State:
        """Attends to the sum of these tiles of keys and values: a row is zero in all but one.

        Two products cost less than to put the tiles together: that takes registers, and the
        tensor cores have nothing else to do.
        """
        logits = functools.reduce(operator.add, (_dot(query, keys, (1, 1)) for keys, _ in tiles))
        return _absorb(
            state, (self.scale * LOG2_E) * logits, valid, [values for _, values in tiles]
        )

    def finish(self, state: State) -> None:
        output, peak, total = state
        present = total > 0
        total = jnp.where(present, total, 1.0)
        logsumexp = jnp.where(present, (peak + jnp.log2(total)) / LOG2_E, MASKED)
        at = (self.part, self.b, self.h)
        plt.store(
            self.refs.outputs.at[*at, self.g[:, None], self.d],
            output / total[:, None],
            mask=self.of_rows(self.in_group),
        )
        plt.store(self.refs.logsumexps.at[*at, self.g], logsumexp, mask=self.in_group)


def _trips(split: Array, splits: int, tiles: Array) -> Array:
    """How many of so many tiles a program takes, if it takes every `splits`-th from `split` on."""
    return jnp.maximum(tiles - split + splits - 1, 0) // splits


def _count(mark: Array) -> Array:
    return jnp.sum(mark.astype(jnp.int32))


def attend_zones(
    query: Array,
    sink: Array,
    sink_tokens: Array,
    window: Array,
    window_tokens: Array,
    store: Array,
    cache_rows: Array,
    tokens: Array,
    slots: Array,
    hit: Array,
    logits: Array,
    value_sums: Array,
    offsets: Array,
    remaining: Array,
    layer: Array | int,
    *,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> ZoneStates:
    """See `pallas_kernels.attend_zones`. Each part is one program's share of one zone.

    Raises:
        NotImplementedError: see `_pallas.check_heads`; or rows of several dtypes, or no room for
            retrieved rows, cached rows, clusters or the window.
    """
    batch, kv_heads, group, head_dim = query.shape
    rows = {"sink": sink, "window": window, "store": store, "cache_rows": cache_rows}
    for name, array in rows.items():
        if array.dtype != query.dtype:
            raise NotImplementedError(
                f"attend_zones: {name} is {array.dtype}, query {query.dtype}; the kernel wants "
                "one dtype"
            )
    _pallas.check_heads("attend_zones", group, head_dim, query.dtype, value_sums.dtype)
    rooms = {"window": window, "store": store, "cache_rows": cache_rows}
    rooms |= {"tokens": tokens, "remaining": remaining}
    for name, array in rooms.items():
        if not array.size:
            raise NotImplementedError(f"attend_zones: {name} is empty: {array.shape}")
    if config is None:
        retrieved, clusters, room = tokens.shape[2], remaining.shape[2], window.shape[3]
        config = _tuning.config(
            "attend_zones",
            heuristic(batch * kv_heads, head_dim, query.dtype.itemsize, retrieved, clusters, room),
            rows=batch * kv_heads,
            group=group,
            head_dim=head_dim,
            dtype=query.dtype.name,
            retrieved=retrieved,
            clusters=clusters,
            window=room,
        )
    parts = config.retrieved_splits + config.estimated_splits + config.steady_splits

    with_sink = sink.size > 0
    operands = [
        query,
        sink if with_sink else window,  # an operand cannot be empty
        sink_tokens,
        window,
        window_tokens,
        store,
        cache_rows,
        tokens,
        slots,
        hit,
        logits,
        value_sums,
        offsets,
        remaining,
        _pallas.scalar(layer),
    ]

    def kernel(*refs: Any) -> None:
        _Program(_Refs(*refs), config, with_sink, scale).run()

    outputs, logsumexps, cache_rows = _pallas.call(
        kernel,
        operands,
        (
            jax.ShapeDtypeStruct((parts, *query.shape), jnp.float32),
            jax.ShapeDtypeStruct((parts, *query.shape[:3]), jnp.float32),
            jax.ShapeDtypeStruct(cache_rows.shape, cache_rows.dtype),
        ),
        (parts * batch * kv_heads,),
        name="attend_zones",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aliases={_Refs._fields.index("cache_before"): 2},
        interpret=interpret,
    )
    return ZoneStates(outputs, logsumexps, cache_rows)
