"""What one program of the kernel of `attend_zones` does in each of the zones."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones import _pooled_program as pooled
from pallas_kernels.attend_zones._program import ProgramOfRow, State
from pallas_kernels.numerics import LOG2_E
from pallas_kernels.toolbox import launch
from pallas_kernels.types import MASKED, NO_ID

# How many tiles' logits are read at once to find the greatest.
LOGIT_TILES = 4


class Program(ProgramOfRow):
    """One program: its part of one zone of one row."""

    def run(self) -> None:
        # What is read from the store may take the longest, so these programs come first.
        kinds = (self.missed, self.hits, self.estimated, self.steady)
        first = 0
        for kind, splits in zip(kinds, self.config.splits, strict=True):
            if not splits:
                continue
            split = self.part - first
            pl.when((split >= 0) & (split < splits))(functools.partial(kind, split))
            first += splits

    def missed(self, split: Array) -> None:
        refs, out = self.refs, self.out
        size, splits = self.config.missed_tile, self.config.missed_splits
        room = refs.tokens.shape[2]
        share = pl.cdiv(room, splits)
        lane = jnp.arange(launch.tile(share))
        first = split * share
        inside = (lane < share) & (first + lane < room)
        where = (self.b, self.h, first + lane)
        hit = plt.load(refs.hit.at[*where], mask=inside, other=True)
        token = plt.load(refs.tokens.at[*where], mask=inside, other=NO_ID)
        slot = plt.load(refs.slots.at[*where], mask=inside, other=NO_ID)
        missed = ~hit & (token != NO_ID)
        number = missed.astype(jnp.int32)
        count = jnp.sum(number)

        # One after the other, so that every tile is full; and in their order, by which programs
        # that run at a time read from few pages: each row's lie in rising segments.
        @pl.when(count > 0)
        def list_missed() -> None:
            at = jnp.where(missed, first + jnp.cumsum(number) - 1, NO_ID)
            plt.store(out.missed_tokens.at[self.b, self.h, at], token, mask=missed)
            plt.store(out.missed_slots.at[self.b, self.h, at], slot, mask=missed)
            if out.missed_places is not None:
                places = out.missed_places.at[self.b, self.h, at]
                plt.store(places, first + lane, mask=missed)
            launch.barrier(self.interpret)

        def read(ids: Any, i: Array) -> Array:
            at = i * size + jnp.arange(size)
            return plt.load(ids.at[self.b, self.h, first + at], mask=at < count, other=NO_ID)

        steps = pl.cdiv(count, size)

        def step(carry: tuple[Array, Array, Array, State]) -> tuple[Array, Array, Array, State]:
            i, token, slot, state = carry
            # The next ones' places are on their way while these ones' rows are.
            following = read(out.missed_tokens, i + 1), read(out.missed_slots, i + 1)
            valid = token != NO_ID
            rows = self.load_rows(refs.store, token, valid)
            scales = None
            if refs.store_scales is not None:
                scales = self.load_scales(refs.store_scales, token, valid)
            # What is admitted in a step is no hit in it, so no order matters.
            admitted = self.of_rows((slot >= 0) & (slot < out.cache.shape[3]))
            for kv, vectors in enumerate(rows):
                into = out.cache.at[*self.row, slot[:, None], kv, self.d]
                plt.store(into, vectors, mask=admitted)
            if scales is not None:
                has_slot = (slot >= 0) & (slot < out.cache.shape[3])
                for kv, numbers in enumerate(scales):
                    at = (*self.row, slot, kv)
                    plt.store(out.cache_scales.at[*at], numbers, mask=has_slot)
            # The query is read again for each tile: else it holds 32 registers of each thread.
            keep = None
            if out.missed_places is not None:
                keep = self.keeping(read(out.missed_places, i), valid)
            attended = rows, valid, scales, keep
            return i + 1, *following, self.attend(state, self.load_query(), *attended)

        # No `fori_loop`: Triton would make its reads asynchronous copies, and those read a host's
        # memory at half of the speed.
        zero = jnp.int32(0)
        start = (
            zero,
            read(out.missed_tokens, zero),
            read(out.missed_slots, zero),
            self.start(size),
        )
        *_, state = lax.while_loop(lambda carry: carry[0] < steps, step, start)
        self.finish(state)

    def hits(self, split: Array) -> None:
        size, splits = self.config.hit_tile, self.config.hit_splits
        steps, places = self.hits_of_share(split, splits, size)
        query, cached = self.load_query(), self.out.cache is not None
        source = self.out.cache if cached else self.refs.store
        scales = self.out.cache_scales if cached else self.refs.store_scales

        def step(i: Array, state: State) -> State:
            place = _row(places, i)
            valid = place != NO_ID
            rows = self.load_rows(source, place, valid)
            its = None if scales is None else self.load_scales(scales, place, valid)
            keep = None
            if self.out.exponents is not None:
                keep = self.keeping((split + i * splits) * size + jnp.arange(size), valid)
            return self.attend(state, query, rows, valid, its, keep)

        self.finish(lax.fori_loop(0, steps, step, self.start(size)))

    def estimated(self, split: Array) -> None:
        refs, splits, size = self.refs, self.config.estimated_splits, self.config.cluster_tile
        b, h, room = self.b, self.h, refs.remaining.shape[2]

        def places(i: Array | int) -> Array:
            return (split + i * splits) * size + jnp.arange(size)

        def load(at: Array, most: Array | None = None) -> tuple[Array, Array]:
            count = plt.load(refs.remaining.at[b, h, at], mask=at < room, other=0)
            if most is not None:
                count = jnp.minimum(count, most)
            logits = plt.load(
                refs.logits.at[b, h, self.g[:, None], at[None, :]],
                mask=self.in_group[:, None] & (at < room)[None, :],
                other=0,
            )
            return count, jnp.where(count[None, :] > 0, LOG2_E * logits, MASKED)

        # First the peak and the end of the clusters to estimate: with the peak known, the tiles
        # need no reduction each; with the end known, the means' loads wait for no others.
        def look(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            peaks, ends = carry
            ats = [places(i * LOGIT_TILES + j) for j in range(LOGIT_TILES)]
            for at, (count, exponents) in zip(ats, [load(at) for at in ats], strict=True):
                peaks = jnp.maximum(peaks, exponents)
                ends = jnp.maximum(ends, jnp.where(count > 0, at + 1, 0))
            return peaks, ends

        # On their way while the greatest logit is looked for.
        shape = pooled.PooledShape(self) if refs.deviations is not None else None
        output, _, masses = self.start(size)
        start = jnp.full(masses.shape, MASKED, jnp.float32), jnp.zeros((size,), jnp.int32)
        most = pl.cdiv(pl.cdiv(room, size), splits)
        peaks, ends = lax.fori_loop(0, pl.cdiv(most, LOGIT_TILES), look, start)
        # One more than the peak: half of a count, 65536 at most, is what float16 holds. To second
        # order a mass is up to thrice as much.
        peak, end = jnp.max(peaks, axis=1) + (1 if shape is None else 3), jnp.max(ends)
        if shape is not None:
            shape.measure()

        def step(i: Array, carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            output, masses, along = carry
            at = places(i)
            low = plt.load(refs.offsets.at[*self.row, at], mask=at < room, other=0)
            high = plt.load(refs.offsets.at[*self.row, at + 1], mask=at < room, other=0)
            count, exponents = load(at, high - low)
            means = plt.load(
                refs.value_means.at[*self.row, at[:, None], self.d],
                mask=self.of_rows(at < end),
                other=0,
            )
            exponents -= peak[:, None]
            if shape is None:
                weights = jnp.exp2(exponents) * count.astype(jnp.float32)[None, :]
            else:
                deviations = shape.load(at, at < end)
                weights, more = shape.weigh(exponents, deviations, high - low, count)
                along += more
            return output + launch.dot(weights.astype(means.dtype), means), masses + weights, along

        steps = _trips(split, splits, pl.cdiv(end, size))
        along = None if shape is None else jnp.zeros(masses.shape, jnp.float32)
        output, masses, along = lax.fori_loop(0, steps, step, (output, masses, along))
        if shape is not None:
            output = shape.add(output, along)
        self.finish((output, peak, masses))

    def steady(self, split: Array) -> None:
        refs, splits, size = self.refs, self.config.steady_splits, self.config.steady_tile
        query, state = self.load_query(), self.start(size)
        zones = [(refs.window, refs.window_tokens)]
        if self.with_sink:
            zones.append((refs.sink, refs.sink_tokens))
        for rows, tokens in zones:
            count = jnp.minimum(tokens[self.b], rows.shape[3])

            def step(i: Array, state: State, rows: Any = rows, count: Array = count) -> State:
                at = (split + i * splits) * size + jnp.arange(size)
                tile = self.load_rows(rows, at, at < count)
                return self.attend(state, query, tile, at < count)

            state = lax.fori_loop(0, _trips(split, splits, pl.cdiv(count, size)), step, state)
        self.finish(state)

    def keeping(self, places: Array, valid: Array) -> Callable[[Array], None]:
        """Give what writes exponents `[g, n]` of rows at `[n]` places of the list."""

        def keep(exponents: Array) -> None:
            at = (self.b, self.h, self.g[:, None], places[None, :])
            mask = self.in_group[:, None] & valid[None, :]
            plt.store(self.out.exponents.at[*at], exponents, mask=mask)

        return keep

    def hits_of_share(self, split: Array, splits: int, size: int) -> tuple[Array, Array]:
        """Where a program's share of the rows that hit lie, read at once.

        Read tile by tile, each tile's rows would wait for their places.

        Returns:
            How many tiles to walk until the last one; and the slots `[tiles, size]`, `NO_ID` for
            what is no hit; without a row cache the tokens of all rows.
        """
        refs = self.refs
        room = refs.tokens.shape[2]
        tile = jnp.arange(launch.tile(pl.cdiv(pl.cdiv(room, size), splits)))[:, None]
        at = (split + tile * splits) * size + jnp.arange(size)[None, :]
        where, inside = (self.b, self.h, at), at < room
        if self.out.cache is None:
            places = plt.load(refs.tokens.at[*where], mask=inside, other=NO_ID)
        else:
            hit = plt.load(refs.hit.at[*where], mask=inside, other=False)
            slots = plt.load(refs.slots.at[*where], mask=inside, other=NO_ID)
            places = jnp.where(hit, slots, NO_ID)
        return jnp.max(jnp.where(places != NO_ID, tile + 1, 0)), places


def _row(matrix: Array, i: Array) -> Array:
    """Row i of an int32 matrix that lies in registers."""
    rows = jnp.arange(matrix.shape[0])[:, None]
    return jnp.sum(jnp.where(rows == i, matrix, 0), axis=0)


def _trips(split: Array, splits: int, tiles: Array) -> Array:
    """How many of so many tiles a program takes, if it takes every `splits`-th from `split` on."""
    return jnp.maximum(tiles - split + splits - 1, 0) // splits
