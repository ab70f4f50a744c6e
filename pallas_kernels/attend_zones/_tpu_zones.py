"""One kv head's zones, as the TPU's kernel attends to them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.numerics import is_masked, log_total
from pallas_kernels.toolbox import mosaic
from pallas_kernels.types import MASKED, NO_ID

# The parts of the result, in the reference's order.
STEADY, RETRIEVED, ESTIMATED = range(3)
PARTS = 3

# The values' sum, relative to the peak of the logits; the peak; and the masses' sum.
State = tuple[Array, Array, Array]


class Refs(NamedTuple):
    """What the kernel is given, by name; of the program's own row, but where that is said.

    Attributes:
        layer: `[1]`.
        ends, retrieved: `[batch, kv_heads]`, where the clusters to estimate and the list end.
        sink_tokens, window_tokens: `[batch]`.
        query: `[group, head_dim]`.
        sink, window, store: whole, in the device's memory.
        token_scalars, tokens: `[1, room]`, the list in scalar memory, and in vector memory.
        logits, means, members: of a block of clusters.
        outputs, logsumexps: `[PARTS, group, head_dim or 1]`.
        steady_tiles, retrieved_tiles: `[2, tile, 2, head_dim]`, the rows that are worked on, and
            the next ones.
        steady_copies, retrieved_copies: `[2]`, a semaphore for the copies of each.
        output, peak, total: the estimated zone's state.
    """

    layer: Any
    ends: Any
    retrieved: Any
    sink_tokens: Any
    window_tokens: Any
    query: Any
    sink: Any
    window: Any
    store: Any
    token_scalars: Any
    tokens: Any
    logits: Any
    means: Any
    members: Any
    outputs: Any
    logsumexps: Any
    steady_tiles: Any
    retrieved_tiles: Any
    steady_copies: Any
    retrieved_copies: Any
    output: Any
    peak: Any
    total: Any

    @property
    def row(self) -> tuple[Any, Any]:
        """The program's sequence and kv head."""
        return pl.program_id(0), pl.program_id(1)

    def finish(self, part: int, state: State) -> None:
        """Write a part of the result."""
        output, peak, total = state
        self.outputs[part] = output / jnp.where(total == 0, 1, total)
        self.logsumexps[part] = log_total(peak, total)


def attend_rows(refs: Refs, scale: float) -> None:
    """Attend to the steady and the retrieved rows."""
    b, _ = refs.row
    state = _empty(refs)
    # Without room for sinks another operand stands for them, and there are none.
    for rows, count in ((refs.sink, refs.sink_tokens[b]), (refs.window, refs.window_tokens[b])):
        state = _attend_steady(refs, rows, count, state, scale)
    refs.finish(STEADY, state)
    refs.finish(RETRIEVED, _attend_retrieved(refs, scale))


def attend_block(refs: Refs) -> None:
    """Attend to a block of clusters by their means; after the last one, write the result."""
    part, end = pl.program_id(2), refs.ends[refs.row]
    size = refs.means.shape[0]

    @pl.when(part == 0)
    def start() -> None:
        refs.output[...], refs.peak[...], refs.total[...] = _empty(refs)

    @pl.when(part * size < end)
    def attend() -> None:
        logits = refs.logits[...]
        # Past the last one that counts there may be anything, and past all of them too.
        members = jnp.where(mosaic.places(part, size) < end, refs.members[...], 0)
        means = jnp.where(mosaic.places(part, size, axis=0) < end, refs.means[...], 0)
        state = refs.output[...], refs.peak[...], refs.total[...]
        valid = (members > 0) & ~is_masked(logits)
        state = _add(state, logits, valid, means, members.astype(jnp.float32))
        refs.output[...], refs.peak[...], refs.total[...] = state

    @pl.when(part == pl.num_programs(2) - 1)
    def finish() -> None:
        refs.finish(ESTIMATED, (refs.output[...], refs.peak[...], refs.total[...]))


def _empty(refs: Refs) -> State:
    group, head_dim = refs.query.shape
    start = jnp.full((group, 1), MASKED, jnp.float32)
    return jnp.zeros((group, head_dim), jnp.float32), start, jnp.zeros((group, 1), jnp.float32)


def _add(state: State, logits: Array, valid: Array, values: Array, counts: Any) -> State:
    """Add what a tile's logits `[group, n]` are of values `[n, head_dim]`, each `counts` times."""
    output, peak, total = state
    logits = jnp.where(valid, logits, MASKED)
    higher = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.where(valid, jnp.exp(logits - higher) * counts, 0)
    shrink = jnp.exp(peak - higher)
    output = output * shrink + mosaic.dot(weights.astype(values.dtype), values)
    return output, higher, total * shrink + jnp.sum(weights, axis=1, keepdims=True)


def _stream(
    tiles: Any,
    start: Callable[[Any, Any], None],
    wait: Callable[[Any, Any], None],
    add: Callable[[Any, Any, State], State],
    state: State,
) -> State:
    """Walk tiles, each of which is copied while the one before it is worked on.

    Args:
        tiles: how many.
        start, wait: of a tile's number, and which of two places it is copied to: start its copies,
            and wait for them.
        add: of the same, and the state before it: return the state after it.
        state: to begin with.
    """
    pl.when(tiles > 0)(lambda: start(0, 0))

    def step(i: Any, state: State) -> State:
        pl.when(i + 1 < tiles)(lambda: start(i + 1, (i + 1) % 2))
        wait(i, i % 2)
        return add(i, i % 2, state)

    return lax.fori_loop(0, tiles, step, state)


def _attend_tile(refs: Refs, tile: Any, valid: Array, state: State, scale: float) -> State:
    """Attend to a tile of rows `[n, 2, head_dim]`, of which none that is not valid is NaN."""
    logits = scale * mosaic.dot(refs.query[...], tile[:, 0], (1, 1))
    return _add(state, logits, valid, tile[:, 1], 1.0)


def _attend_steady(refs: Refs, rows: Any, count: Any, state: State, scale: float) -> State:
    room = rows.shape[3]
    size = min(refs.steady_tiles.shape[1], room)

    def first(i: Any) -> Any:
        # The last tile begins early enough to end with the rows.
        return jnp.minimum(i * size, room - size)

    def copy(i: Any, place: Any) -> Any:
        return backend.async_copy(
            rows.at[refs.layer[0], *refs.row, pl.ds(first(i), size)],
            refs.steady_tiles.at[place, pl.ds(0, size)],
            refs.steady_copies.at[place],
        )

    def add(i: Any, place: Any, state: State) -> State:
        def valid(axis: int) -> Array:
            at = first(i) + mosaic.places(0, size, axis)
            return (at >= i * size) & (at < count)

        tile = refs.steady_tiles[place, :size]
        # A row that is not valid may hold anything, NaN included.
        tile = jnp.where(valid(0)[:, :, None], tile, 0)
        return _attend_tile(refs, tile, valid(1), state, scale)

    return _stream(
        pl.cdiv(count, size),
        lambda i, place: copy(i, place).start(),
        lambda i, place: copy(i, place).wait(),
        add,
        state,
    )


def _attend_retrieved(refs: Refs, scale: float) -> State:
    size, room = refs.retrieved_tiles.shape[1], refs.store.shape[3]

    def each_row(i: Any, place: Any, act: Callable[[Any], None], none: Any = None) -> None:
        """Act on each row's copy, or do without where there is no row."""

        def visit(n: Any, _: None) -> None:
            token = refs.token_scalars[0, i * size + n]
            target = refs.retrieved_tiles.at[place, n]

            @pl.when(token != NO_ID)
            def copy() -> None:
                source = refs.store.at[refs.layer[0], *refs.row, jnp.minimum(token, room - 1)]
                act(backend.async_copy(source, target, refs.retrieved_copies.at[place]))

            if none is not None:
                pl.when(token == NO_ID)(lambda: none(target))

        lax.fori_loop(0, size, visit, None)

    def empty(target: Any) -> None:
        target[...] = jnp.zeros(target.shape, target.dtype)

    def add(i: Any, place: Any, state: State) -> State:
        valid = refs.tokens[:, pl.ds(pl.multiple_of(i * size, size), size)] != NO_ID
        return _attend_tile(refs, refs.retrieved_tiles[place], valid, state, scale)

    return _stream(
        pl.cdiv(refs.retrieved[refs.row], size),
        lambda i, place: each_row(i, place, lambda copy: copy.start(), empty),
        lambda i, place: each_row(i, place, lambda copy: copy.wait()),
        add,
        _empty(refs),
    )
