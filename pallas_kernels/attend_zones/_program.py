"""What every program of the kernels of `attend_zones` does: its part, and a running softmax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._config import Config
from pallas_kernels.attend_zones._roles import choose_part
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED

# Output `[g, d]`, peak `[g]` and masses `[g, n]` of a running softmax, float32. The masses are
# summed over n in the end only: each sum over the warps would stop all of them.
State = tuple[Array, Array, Array]


class Operands(NamedTuple):
    """The kernel's operands, in order.

    Attributes:
        query: `[batch, kv_heads, group, head_dim]`.
        sink, sink_tokens, window, window_tokens: as in `SteadyRows`; where there is no room
            for sinks, the window stands in their place.
        store, cache_before: the data of `StoredRows`; no row cache is None.
        tokens, slots, hit: as in `Picks`.
        logits, value_means, offsets, remaining: as in `Estimate`.
        layer: int32 scalar.
        claims_before: see `choose_part`; None where parts are taken in order.
        store_scales, cache_scales_before: the scales of `StoredRows`; None for plain rows, and
            where there is no row cache.
        products, deviations: as in `Pooled`; None without.
    """

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
    value_means: Any
    offsets: Any
    remaining: Any
    layer: Any
    claims_before: Any
    store_scales: Any
    cache_scales_before: Any
    products: Any
    deviations: Any


class Results(NamedTuple):
    """The kernel's results, in order; None for what is not there.

    Attributes:
        outputs, logsumexps: as in `ZoneStates`.
        cache: the row cache, in place of `cache_before`.
        missed_tokens, missed_slots: `[batch, kv_heads, retrieved]` int32, scratch: the missed
            rows', without the hits between them.
        claims: in place of `claims_before`.
        cache_scales: in place of `cache_scales_before`.
        exponents: `[batch, kv_heads, group, retrieved]` float32, binary logarithms of the retrieved
            rows' masses, for an estimate by moments; anything where there is no row.
        missed_places: as `missed_tokens`, the rows' places in the list; with `exponents` only.
    """

    outputs: Any
    logsumexps: Any
    cache: Any = None
    missed_tokens: Any = None
    missed_slots: Any = None
    claims: Any = None
    cache_scales: Any = None
    exponents: Any = None
    missed_places: Any = None


def aliases(operands: Operands, results: Results) -> dict[int, int]:
    """Tell the numbers of the operands that are written in place, and of the results they are."""

    def number(fields: Any, name: str) -> int:
        before = fields[: fields._fields.index(name)]
        return sum(field is not None for field in before)

    in_place = [
        name for name in ("cache", "claims", "cache_scales") if getattr(results, name) is not None
    ]
    return {number(operands, f"{name}_before"): number(results, name) for name in in_place}


class PartOfRow:
    """One program of a kernel: which part of which row it has, and attention to KV rows.

    A row is a sequence's kv head.
    """

    # Its operands, with a query and a layer, and its results, with outputs and logsumexps.
    refs: Any
    out: Any
    scale: float

    def take(self, number: Any) -> None:
        """Take the part and the row of this number; the rows of a part come one after another."""
        batch, kv_heads, group, head_dim = self.refs.query.shape
        rows = batch * kv_heads
        self.part = number // rows
        row = number % rows
        self.b, self.h = row // kv_heads, row % kv_heads
        self.row = (self.refs.layer[...], self.b, self.h)
        self.d = jnp.arange(launch.tile(head_dim))[None, :]
        self.g = jnp.arange(launch.MAX_GROUP)
        self.head_dim = head_dim
        self.in_group = self.g < group

    def start(self, size: int) -> State:
        return (
            jnp.zeros((launch.MAX_GROUP, self.d.size), jnp.float32),
            jnp.full((launch.MAX_GROUP,), MASKED, jnp.float32),
            jnp.zeros((launch.MAX_GROUP, size), jnp.float32),
        )

    def of_rows(self, valid: Array) -> Array:
        """Tell what of vectors `[n, d]` is to be read or written, if `[n]` of them are."""
        if self.d.size == self.head_dim:
            return jnp.broadcast_to(valid[:, None], (valid.size, self.d.size))
        return valid[:, None] & (self.d < self.head_dim)

    def load_query(self) -> Array:
        """`[g, d]`, zero outside the group and the head."""
        at = self.refs.query.at[self.b, self.h, self.g[:, None], self.d]
        return plt.load(at, mask=self.of_rows(self.in_group), other=0)

    def load_rows(self, rows: Any, places: Array, valid: Array) -> list[Array]:
        """Keys and values `[n, d]` of the row's `[n]` places, zero where not valid."""
        mask = self.of_rows(valid)
        # The values first: what makes the keys ready for a product waits for them, so the values'
        # loads must be on their way by then.
        values, keys = (
            plt.load(rows.at[*self.row, places[:, None], kv, self.d], mask=mask, other=0)
            for kv in (1, 0)
        )
        return [keys, values]

    def load_scales(self, scales: Any, places: Array, valid: Array) -> list[Array]:
        """Scales `[n]` of keys and of values, zero where not valid."""
        return [plt.load(scales.at[*self.row, places, kv], mask=valid, other=0) for kv in (0, 1)]

    def attend(
        self,
        state: State,
        query: Array,
        rows: list[Array],
        valid: Array,
        scales: list[Array] | None = None,
        keep: Callable[[Array], None] | None = None,
    ) -> State:
        """Attends to a tile of keys and values; levels with scales are not multiplied by them.

        The products are: a key's scale multiplies its logits, a value's its weights. Levels are
        whole numbers that every float holds.

        Args:
            state: before the tile.
            query: `[g, d]`.
            rows: keys and values `[n, d]`.
            valid: bool `[n]`.
            scales: `[n]` each, of keys and of values.
            keep: is given the binary logarithms of the rows' masses, `[g, n]`.
        """
        output, peak, masses = state
        keys, values = rows
        if scales is not None:
            keys, values = keys.astype(query.dtype), values.astype(query.dtype)
        exponents = (self.scale * LOG2_E) * launch.dot(query, keys, (1, 1))
        if scales is not None:
            exponents = exponents * scales[0][None, :]
        if keep is not None:
            keep(exponents)
        exponents = jnp.where(valid[None, :], exponents, MASKED)
        higher = jnp.maximum(peak, jnp.max(exponents, axis=1))
        weights = jnp.where(valid[None, :], jnp.exp2(exponents - higher[:, None]), 0.0)
        shrink = jnp.exp2(peak - higher)[:, None]
        weighted = weights if scales is None else weights * scales[1][None, :]
        output = output * shrink + launch.dot(weighted.astype(values.dtype), values, (1, 0))
        return output, higher, masses * shrink + weights

    def finish(self, state: State) -> None:
        output, peak, masses = state
        self.write(output, peak, jnp.sum(masses, axis=1))

    def write(self, output: Array, peak: Array, total: Array) -> None:
        """Write the part's output and logsumexp; `total` is the sum of the masses, `[g]`."""
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        logsumexp = jnp.where(empty, MASKED, (peak + jnp.log2(total)) / LOG2_E)
        at = (self.part, self.b, self.h)
        plt.store(
            self.out.outputs.at[*at, self.g[:, None], self.d],
            output / total[:, None],
            mask=self.of_rows(self.in_group),
        )
        plt.store(self.out.logsumexps.at[*at, self.g], logsumexp, mask=self.in_group)


class ProgramOfRow(PartOfRow):
    """One program of the kernel of the zones."""

    def __init__(
        self,
        refs: Operands,
        out: Results,
        config: Config,
        scale: float,
        with_sink: bool,
        interpret: bool,
    ) -> None:
        self.refs, self.out, self.config, self.scale = refs, out, config, scale
        self.with_sink = with_sink
        self.interpret = interpret
        batch, kv_heads = refs.query.shape[:2]
        number, rows = pl.program_id(0), batch * kv_heads
        if out.claims is not None:
            missed = config.missed_splits * rows
            others = sum(config.splits) * rows - missed
            threads = 32 * config.num_warps
            number = choose_part(out.claims, missed, others, threads, interpret)
        self.take(number)
