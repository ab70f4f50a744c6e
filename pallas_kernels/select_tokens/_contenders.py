"""The first kernel of `select_tokens`: drops the candidates that are surely not selected."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import NO_ID, ordered_bits

# How fine the sample's threshold is set, in steps of the keys: 2^-7 of a mass's logarithm.
RESOLUTION = 2**16
# How many standard deviations of the sample's count it is set lower, and how many tokens.
DEVIATIONS, SPARE = 4, 8


def expected(budget: int, candidates: int, sample: int) -> int:
    """How many contenders there are, about, of so many candidates."""
    share = budget * sample / candidates
    wanted = share + DEVIATIONS * math.sqrt(share) + SPARE
    return min(candidates, math.ceil(wanted * candidates / sample))


def list_contenders(*refs: Any, chunk: int, sample: int) -> None:
    """Lists a chunk's candidates above a threshold that a sample of the row suggests.

    The threshold is set so low that more than the budget should pass it, by four standard
    deviations of the sample's count. Whether they do is for `select_rows` to check: it selects
    among all candidates if not.

    Refs:
        log_mass: `[batch, kv_heads, candidates]` float32.
        starts: `Candidates.starts`.
        budget: `[batch]` int32.
        offsets: `[layers, batch, kv_heads, clusters + 1]` int32.
        layer: int32 scalar.
        keys, places: `[batch, kv_heads, chunks, chunk]` uint32 and int32, out: the contenders of
            each chunk by rising place.
        counts: `[batch, kv_heads, chunks]` int32, out: how many there are.
        sizes: `[batch, kv_heads, clusters]` int32, out: the clusters' sizes.
    """
    log_mass_ref, starts_ref, budget_ref, offsets_ref, layer_ref, *results = refs
    keys_ref, places_ref, counts_ref, sizes_ref = results
    kv_heads, room = log_mass_ref.shape[1:]
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]

    clusters = sizes_ref.shape[-1]
    share = pl.cdiv(clusters, counts_ref.shape[-1])
    lane = jnp.arange(_pallas.tile(share))
    c = part * share + lane
    exists = (lane < share) & (c < clusters)
    begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
    ends = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0)
    plt.store(sizes_ref.at[b, h, jnp.where(exists, c, NO_ID)], ends - begins, mask=exists)

    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    count = jnp.minimum(count, room)
    budget = jnp.minimum(plt.load(budget_ref.at[b]), count)

    @pl.when(part * chunk >= count)
    def list_none() -> None:
        plt.store(counts_ref.at[b, h, part], jnp.int32(0))

    @pl.when(part * chunk < count)
    def list_some() -> None:
        place = part * chunk + jnp.arange(chunk)
        key = plt.load(log_mass_ref.at[b, h, place], mask=place < count, other=0)
        key = ordered_bits(key)

        stride = lax.div(count + (sample - 1), jnp.int32(sample))
        at = stride * jnp.arange(sample)
        sampled = plt.load(log_mass_ref.at[b, h, at], mask=at < count, other=0)
        sampled = jnp.where(at < count, ordered_bits(sampled), 0)
        rank = budget.astype(jnp.float32) / stride.astype(jnp.float32)
        wanted = (rank + DEVIATIONS * jnp.sqrt(rank) + SPARE).astype(jnp.int32)

        def held(key: Any) -> Any:
            return jnp.sum((sampled >= key).astype(jnp.int32))

        # From zero, which all hold: where the sample is too small, all pass.
        least = jnp.min(jnp.where(at < count, sampled, jnp.uint32(2**32 - 1)))
        low = jnp.where(wanted > lax.div(count, stride), jnp.uint32(0), least)
        high = jnp.maximum(jnp.max(sampled), low) + jnp.uint32(1)
        lowest, _ = threshold(held, wanted, low, high, RESOLUTION)

        passes = (place < count) & (key >= lowest)
        number = passes.astype(jnp.int32)
        at = jnp.where(passes, jnp.cumsum(number) - 1, NO_ID)
        plt.store(keys_ref.at[b, h, part, at], key, mask=passes)
        plt.store(places_ref.at[b, h, part, at], place, mask=passes)
        plt.store(counts_ref.at[b, h, part], jnp.sum(number))
