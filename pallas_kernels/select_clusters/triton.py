"""`select_clusters` as Triton kernels: rank the clusters, split off most of them, list the best."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels import tuning
from pallas_kernels.numerics import ordered_bits
from pallas_kernels.select_clusters._list import list_chunk
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.head_calls import Rows
from pallas_kernels.toolbox.head_view import Row
from pallas_kernels.toolbox.sampled_split import (
    Lists,
    find_bracket,
    list_shapes,
    places_of_threads,
    sample_stride,
    split,
)
from pallas_kernels.toolbox.selection_end import end_of_all, find_end, read_end
from pallas_kernels.types import GRANULE, NO_ID, Candidates


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        share: clusters that a program of the first kernel ranks.
        chunk: clusters that a program of the last one lists.
        in_registers: every program of the last kernel finds the end of the selection for itself,
            with the whole row in registers. If not, kernels before it do, see `_split`.
        tile: clusters that are held in registers: all, or those that contend.
        sample: clusters whose masses tell which contend.
        share_warps, end_warps, num_warps: `num_warps` of the first kernel, of the one that finds a
            row's end, and of the others, see Triton.
    """

    share: int = 512
    chunk: int = 1024
    in_registers: bool = True
    tile: int = 8192
    sample: int = 2048
    share_warps: int = 4
    end_warps: int = 16
    num_warps: int = 8


# The most clusters whose keys and sizes fit in the registers of 8 warps.
MOST_IN_REGISTERS = 8192


def heuristic(rows: int, clusters: int) -> Config:
    """A config for shapes that were not tuned."""
    whole = launch.tile(clusters, 32)
    if whole > MOST_IN_REGISTERS:
        # A larger sample costs less than the contenders that it leaves out.
        return Config(
            share=256,
            chunk=1024,
            in_registers=False,
            tile=MOST_IN_REGISTERS,
            sample=4096,
            num_warps=16,
        )
    # No more programs than processors of a large GPU: they would all do the same in turns.
    chunk = max(whole // min(16, launch.tile(max(128 // rows, 1))), 32)
    return Config(
        # Of few rows, programs enough for a large GPU's processors.
        share=min(256 if rows * whole <= 128 * 512 else 512, whole),
        chunk=chunk,
        tile=whole,
        share_warps=max(1, min(4, whole // 256)),
        num_warps=max(1, min(16 if chunk > 8 * 256 else 8, whole // 512)),
    )


def _rank(*refs: Any, config: Config) -> None:
    """Keys in the order of group mass, and sizes; both zero for a cluster without members."""
    logits_ref, logsumexp_ref, offsets_ref, layer_ref, keys_ref, sizes_ref, *sampled = refs
    _, kv_heads, group, clusters = logits_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]
    c = part * config.share + jnp.arange(config.share)
    exists = c < clusters
    begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
    sizes = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0) - begins
    peak = jnp.full(config.share, -jnp.inf, jnp.float32)
    heads = []
    for g in range(group):
        at = (b, h, jnp.int32(g))
        logits = plt.load(logits_ref.at[*at, c], mask=exists, other=0)
        heads.append(logits - plt.load(logsumexp_ref.at[at]))
        peak = jnp.maximum(peak, heads[-1])
    mass = sum(jnp.exp(x - peak) for x in heads)
    keys = ordered_bits(peak + jnp.log(mass))
    keys = jnp.where(sizes > 0, keys, 0)
    # The arrays are padded to whole programs, so that no store of theirs needs a mask.
    plt.store(keys_ref.at[b, h, c], keys)
    plt.store(sizes_ref.at[b, h, c], sizes)
    if sampled:
        # Here they are at hand; one program alone waits long for so many scattered reads.
        stride = sample_stride(clusters, config.sample)
        drawn = exists & (c % stride == stride // 2)
        at = (b, h, jnp.where(drawn, c // stride, NO_ID))
        for ref, x in zip(sampled, (keys, sizes), strict=True):
            plt.store(ref.at[at], x, mask=drawn)


class _Ranked:
    """One row's ranked clusters, and how many tokens are to be taken of them."""

    def __init__(self, row: Row, keys_ref: Any, sizes_ref: Any, offsets_ref: Any, budget_ref: Any):
        self.row, self.keys, self.sizes, self.offsets = row, keys_ref, sizes_ref, offsets_ref
        self.clusters = jnp.int32(offsets_ref.shape[-1] - 1)
        self.tokens = row.load(offsets_ref, self.clusters, stacked=True)
        self.budget = jnp.minimum(plt.load(budget_ref.at[row.b]), self.tokens)

    def none_from(self, cluster: int) -> Any:
        """Whether neither this cluster nor one behind it is in use."""
        first = jnp.minimum(jnp.int32(cluster), self.clusters)
        return self.row.load(self.offsets, first, stacked=True) == self.tokens

    def element(self, c: Any) -> tuple[Any, Any, Any]:
        """Clusters' keys, weights and places."""
        return *self.load(c, c < self.clusters), c

    def load(self, c: Any, exists: Any) -> tuple[Any, Any]:
        exists = exists & (c < self.clusters)
        return self.row.load(self.keys, c, mask=exists), self.row.load(self.sizes, c, mask=exists)


def _row_of(refs: Any, interpret: bool) -> tuple[Row, _Ranked, Any]:
    """The program's row, its clusters, and what is left of the refs."""
    row = Row(pl.program_id(1), refs[0].shape[1], refs[4][...], interpret=interpret)
    return row, _Ranked(row, *refs[:4]), refs[5:]


def _bracket(*refs: Any, config: Config, interpret: bool) -> None:
    row, ranked, refs = _row_of(refs, interpret)
    keys_ref, sizes_ref, bracket_ref, number_ref = refs
    clusters = ranked.offsets.shape[-1] - 1
    stride = sample_stride(clusters, config.sample)

    def load(i: Any) -> tuple[Any, Any]:
        exists = stride * i + stride // 2 < clusters
        return row.load(keys_ref, i, mask=exists), row.load(sizes_ref, i, mask=exists)

    sizes = config.sample, 32 * config.num_warps
    find_bracket(row, bracket_ref, number_ref, load, clusters, ranked.budget, *sizes)


def _split(*refs: Any, config: Config, interpret: bool) -> None:
    row, ranked, (bracket_ref, _, *lists) = _row_of(refs, interpret)
    written = Lists._make([*lists, None])
    split(row, pl.program_id(0), written, bracket_ref, ranked.load, ranked.clusters, config.chunk)


def _end(*refs: Any, config: Config, interpret: bool) -> None:
    row, ranked, lists = _row_of(refs, interpret)
    budget = jnp.maximum(ranked.budget, 1)
    sizes = config.tile, 32 * config.end_warps
    find_end(row, Lists(*lists), ranked.load, ranked.clusters, budget, *sizes)


def _list(*refs: Any, config: Config, interpret: bool) -> None:
    """Lists a chunk's selected clusters, from where those of the chunks before it end."""
    row, ranked, refs = _row_of(refs, interpret)
    *found, selected_ref, clusters_ref, starts_ref, granules_ref = refs
    part, budget = pl.program_id(0), ranked.budget
    threads = 32 * config.num_warps
    if config.in_registers:
        places = places_of_threads(config.tile, threads)
        half = max(len(places) // 2, 1)
        # There is room for more clusters than are in use: half of the tile may hold them.
        lower, upper = places[:half], places[half:]
        near = [ranked.element(place) for place in lower]

        def find(*rest: Any) -> Any:
            elements = [*near, *map(ranked.element, rest)]
            return end_of_all(row, part, elements, jnp.maximum(budget, 1), config.chunk)

        end = lax.cond(ranked.none_from(half * threads), find, lambda: find(*upper))
    else:
        sizes = config.chunk, threads
        end = read_end(row, part, Lists(*found), ranked.load, ranked.clusters, *sizes)
    listed = selected_ref, clusters_ref, starts_ref, granules_ref
    list_chunk(row, ranked.load, end, budget > 0, listed, chunk=config.chunk, threads=threads)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
    max_candidates: int,
    config: Config | None = None,
    interpret: bool = False,
) -> Candidates:
    """See `pallas_kernels.select_clusters`.

    Raises:
        NotImplementedError: for groups that the kernel is not made for.
        ValueError: the config's tile does not hold the clusters that it is to hold.
    """
    batch, kv_heads, group, clusters = logits.shape
    launch.check_heads("select_clusters", group, launch.HEAD_DIMS[0])
    config = config or tuning.config(
        "select_clusters",
        heuristic(batch * kv_heads, clusters),
        rows=batch * kv_heads,
        clusters=clusters,
    )

    if config.in_registers and config.tile < clusters:
        raise ValueError(
            f"select_clusters: a tile of {config.tile} does not hold {clusters} clusters; give a "
            "larger one, or in_registers=False"
        )

    rows = Rows((batch, kv_heads), interpret)
    call = functools.partial(rows.call, num_warps=config.num_warps)
    padded = pl.cdiv(clusters, config.share) * config.share
    shapes = [rows.of(padded, dtype=jnp.uint32), rows.of(padded)]
    if not config.in_registers:
        shapes += [rows.of(config.sample, dtype=jnp.uint32), rows.of(config.sample)]
    keys, sizes, *sampled = call(
        functools.partial(_rank, config=config),
        (logits, logsumexp, offsets, launch.scalar(layer)),
        tuple(shapes),
        padded // config.share,
        name="rank_clusters",
        num_warps=config.share_warps,
    )
    operands = (keys, sizes, offsets, budget.astype(jnp.int32), launch.scalar(layer))
    chunks = pl.cdiv(clusters, config.chunk)
    found: tuple[Any, ...] = ()
    if not config.in_registers:
        lists_of = list_shapes(rows, clusters, chunks)
        bracket, number = call(
            functools.partial(_bracket, config=config, interpret=interpret),
            (*operands, *sampled),
            (rows.of(2, dtype=jnp.uint32), lists_of.number),
            1,
            name="bracket_clusters",
        )
        lists = call(
            functools.partial(_split, config=config, interpret=interpret),
            (*operands, bracket, number),
            lists_of[:-1],
            chunks,
            name="split_clusters",
            aliases={6: 3},
        )
        end = call(
            functools.partial(_end, config=config, interpret=interpret),
            (*operands, *lists),
            lists_of.end,
            1,
            name="find_last_cluster",
            num_warps=config.end_warps,
        )
        found = (*lists, end)
    results = call(
        functools.partial(_list, config=config, interpret=interpret),
        (*operands, *found),
        (
            rows.of(clusters, dtype=jnp.bool_),
            rows.of(clusters),
            rows.of(clusters + 1),
            rows.of(pl.cdiv(max_candidates, GRANULE)),
        ),
        chunks,
        name="list_clusters",
    )
    return Candidates(*results)
