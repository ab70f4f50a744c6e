"""The first kernel of `select_tokens`: drops the candidates that are surely not selected."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels._bisect import threshold
from pallas_kernels._numerics import NO_ID, ordered_bits

# Bits of a key that the sample's threshold keeps: a relative step of 2^-7 is fine enough.
SAMPLE_LOWEST_BIT = 16


def list_contenders(
    log_mass_ref: Any,
    starts_ref: Any,
    budget_ref: Any,
    keys_ref: Any,
    places_ref: Any,
    counts_ref: Any,
    *,
    chunk: int,
    sample: int,
) -> None:
    """Lists a chunk's candidates above a threshold that a sample of the row suggests.

    The threshold is set so low that more than the budget should pass it, by four standard
    deviations of the sample's count. Whether they do is for `select_rows` to check: it selects
    among all candidates if not.

    Args:
        log_mass_ref: `[batch, kv_heads, candidates]` float32.
        starts_ref: `Candidates.starts`.
        budget_ref: `[batch]` int32.
        keys_ref, places_ref: `[batch, kv_heads, chunks, chunk]` uint32 and int32, out: the
            contenders of each chunk by rising place.
        counts_ref: `[batch, kv_heads, chunks]` int32, out: how many there are.
        chunk: candidates a program.
        sample: at most how many candidates are looked at for the threshold.
    """
    kv_heads, room = log_mass_ref.shape[1:]
    part, row = pl.program_id(0), pl.program_id(1)
    b, h = row // kv_heads, row % kv_heads
    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    count = jnp.minimum(count, room)
    budget = jnp.minimum(plt.load(budget_ref.at[b]), count)

    @pl.when(part * chunk >= count)
    def list_none() -> None:
        plt.store(counts_ref.at[b, h, part], jnp.int32(0))

    @pl.when(part * chunk < count)
    def list_some() -> None:
        stride = lax.div(count + (sample - 1), jnp.int32(sample))
        place = stride * jnp.arange(sample)
        sampled = plt.load(log_mass_ref.at[b, h, place], mask=place < count, other=0)
        sampled = jnp.where(place < count, ordered_bits(sampled), 0)
        expected = budget.astype(jnp.float32) / stride.astype(jnp.float32)
        wanted = (expected + 4 * jnp.sqrt(expected) + 8).astype(jnp.int32)

        def held(key: Any) -> Any:
            return jnp.sum((sampled >= key).astype(jnp.int32))

        # Where the sample is too small for that, the key stays at zero, and all pass.
        lowest, _ = threshold(held, wanted, lowest_bit=SAMPLE_LOWEST_BIT)

        place = part * chunk + jnp.arange(chunk)
        key = plt.load(log_mass_ref.at[b, h, place], mask=place < count, other=0)
        key = ordered_bits(key)
        passes = (place < count) & (key >= lowest)
        number = passes.astype(jnp.int32)
        at = jnp.where(passes, jnp.cumsum(number) - 1, NO_ID)
        plt.store(keys_ref.at[b, h, part, at], key, mask=passes)
        plt.store(places_ref.at[b, h, part, at], place, mask=passes)
        plt.store(counts_ref.at[b, h, part], jnp.sum(number))
