"""Before one program a row selects: candidates that are surely not selected are dropped."""

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.numerics import ordered_bits
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.block_select import last_key
from pallas_kernels.toolbox.block_sums import scan_together
from pallas_kernels.types import NO_ID

# How fine the sample's threshold is set, in bits of the keys: 2^-7 of a mass's logarithm.
FINE = 16
# How many standard deviations of the sample's count it is set lower, and how many tokens.
DEVIATIONS, SPARE = 4, 8


def most_expected(budget: int, candidates: int, sample: int) -> int:
    """How many contenders of so many candidates there are at most, but for rare samples."""
    share = budget * sample / candidates
    wanted = share + DEVIATIONS * math.sqrt(share) + SPARE
    return min(candidates, math.ceil((wanted + 3 * math.sqrt(wanted)) * candidates / sample))


def draw_sample(
    log_mass_ref: Any, starts_ref: Any, drawn_ref: Any, *, sample: int, block: int
) -> None:
    """Draw a block of a row's sample: one program alone waits long for so many scattered reads.

    Args:
        log_mass_ref: `[batch, kv_heads, candidates]` float32.
        starts_ref: `Candidates.starts`.
        drawn_ref: `[batch, kv_heads, sample]` uint32, out.
        sample: candidates drawn, a row.
        block: how many of them are a program's.
    """
    row = pl.program_id(1)
    b, h = row // log_mass_ref.shape[1], row % log_mass_ref.shape[1]
    i = pl.program_id(0) * block + jnp.arange(block)
    stride, count = _stride(log_mass_ref, starts_ref, b, h, sample)
    plt.store(drawn_ref.at[b, h, i], _sampled(log_mass_ref, b, h, stride * i, count))


def _stride(log_mass_ref: Any, starts_ref: Any, b: Any, h: Any, sample: int) -> tuple[Any, Any]:
    """How far apart the sample's candidates are, and how many candidates a row has: int32."""
    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    count = jnp.maximum(jnp.minimum(count, log_mass_ref.shape[-1]), 1)
    return lax.div(count + (sample - 1), jnp.int32(sample)), count


def _sampled(log_mass_ref: Any, b: Any, h: Any, at: Any, count: Any) -> Any:
    """Keys of the sample's candidates; zero, which is none's, past their end."""
    log_mass = plt.load(log_mass_ref.at[b, h, at], mask=at < count, other=0)
    return jnp.where(at < count, ordered_bits(log_mass), 0)


def estimate_threshold(
    log_mass_ref: Any,
    starts_ref: Any,
    budget_ref: Any,
    drawn_ref: Any,
    lowest_ref: Any,
    *,
    sample: int,
    threads: int,
    interpret: bool,
) -> None:
    """Set a key that more candidates should reach than the budget, from a sample of the row.

    It is set so low that more than the budget should reach it, by four standard deviations of the
    sample's count. Whether they do is for `pick_rows` to check: it selects among all candidates if
    not.

    Args:
        log_mass_ref: `[batch, kv_heads, candidates]` float32.
        starts_ref: `Candidates.starts`.
        budget_ref: `[batch, kv_heads]` int32.
        drawn_ref: from `draw_sample`, or None.
        lowest_ref: `[batch, kv_heads]` uint32, out.
        sample: candidates in the sample, a row.
        threads: of the program.
        interpret: whether the kernel is interpreted.
    """
    row = pl.program_id(1)
    b, h = row // log_mass_ref.shape[1], row % log_mass_ref.shape[1]
    stride, count = _stride(log_mass_ref, starts_ref, b, h, sample)
    budget = jnp.minimum(plt.load(budget_ref.at[b, h]), count)
    sampled = []
    for first in range(0, sample, threads):
        i = first + jnp.arange(threads)
        if drawn_ref is not None:
            sampled.append(plt.load(drawn_ref.at[b, h, i], mask=i < sample, other=0))
        else:
            sampled.append(_sampled(log_mass_ref, b, h, stride * i, count))
    rank = budget.astype(jnp.float32) / stride.astype(jnp.float32)
    wanted = (rank + DEVIATIONS * jnp.sqrt(rank) + SPARE).astype(jnp.int32)
    found = last_key(sampled, None, wanted, fine=FINE, interpret=interpret)
    # Where the sample is too small, all pass.
    lowest = jnp.where(wanted > lax.div(count, stride), jnp.uint32(0), found.key)
    here = jnp.full(threads, b), jnp.full(threads, h)
    plt.store(lowest_ref.at[here], lowest)


def list_contenders(
    log_mass_ref: Any,
    starts_ref: Any,
    lowest_ref: Any,
    offsets_ref: Any,
    layer_ref: Any,
    keys_ref: Any,
    places_ref: Any,
    counts_ref: Any,
    sizes_ref: Any,
    *,
    chunk: int,
    threads: int,
    interpret: bool,
) -> None:
    """List a chunk's candidates of the lowest key or a larger one.

    Args:
        log_mass_ref, starts_ref: as above.
        lowest_ref: `[batch, kv_heads]` uint32.
        offsets_ref: `[layers, batch, kv_heads, clusters + 1]` int32.
        layer_ref: int32 scalar.
        keys_ref, places_ref: `[batch, kv_heads, chunks, chunk]` uint32 and int32, out: the
            contenders of each chunk by rising place.
        counts_ref: `[batch, kv_heads, chunks]` int32, out: how many there are.
        sizes_ref: `[batch, kv_heads, clusters]` int32, out: the clusters' sizes.
        chunk: candidates that are a program's.
        threads: of the program.
        interpret: whether the kernel is interpreted.
    """
    kv_heads, room = log_mass_ref.shape[1:]
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, layer = row // kv_heads, row % kv_heads, layer_ref[...]

    clusters = sizes_ref.shape[-1]
    share = pl.cdiv(clusters, counts_ref.shape[-1])
    lane = jnp.arange(launch.tile(share))
    c = part * share + lane
    exists = (lane < share) & (c < clusters)
    begins = plt.load(offsets_ref.at[layer, b, h, c], mask=exists, other=0)
    ends = plt.load(offsets_ref.at[layer, b, h, c + 1], mask=exists, other=0)
    plt.store(sizes_ref.at[b, h, jnp.where(exists, c, NO_ID)], ends - begins, mask=exists)

    count = plt.load(starts_ref.at[b, h, jnp.int32(starts_ref.shape[-1] - 1)])
    count = jnp.minimum(count, room)

    @pl.when(part * chunk >= count)
    def list_none() -> None:
        plt.store(counts_ref.at[b, h, part], jnp.int32(0))

    @pl.when(part * chunk < count)
    def list_some() -> None:
        # Each thread has a run of places, so that one sum over the threads serves all of them:
        # of a chunk as a vector, Triton makes one for every element of a thread.
        run = max(chunk // threads, 1)
        nths = [run * jnp.arange(threads) + j for j in range(run)]
        places = [part * chunk + nth for nth in nths]
        exist = [(nth < chunk) & (i < count) for nth, i in zip(nths, places, strict=True)]
        lowest = plt.load(lowest_ref.at[b, h])
        keys, marks = [], []
        for place, exists in zip(places, exist, strict=True):
            key = plt.load(log_mass_ref.at[b, h, place], mask=exists, other=0)
            keys.append(ordered_bits(key))
            marks.append(exists & (keys[-1] >= lowest))
        numbers = [passes.astype(jnp.int32) for passes in marks]
        own = functools.reduce(jnp.add, numbers)
        [(earlier, number)] = scan_together([own], interpret=interpret)
        befores = list(itertools.accumulate(numbers[:-1], jnp.add, initial=earlier))
        for key, place, passes, before in zip(keys, places, marks, befores, strict=True):
            at = jnp.where(passes, before, NO_ID)
            plt.store(keys_ref.at[b, h, part, at], key, mask=passes)
            plt.store(places_ref.at[b, h, part, at], place, mask=passes)
        here = (jnp.full(threads, x) for x in (b, h, part))
        plt.store(counts_ref.at[*here], number)


def join_contenders(
    keys_ref: Any,
    places_ref: Any,
    counts_ref: Any,
    all_keys_ref: Any,
    all_places_ref: Any,
    count_ref: Any,
    *,
    block: int,
) -> None:
    """Move a chunk's contenders behind those of the chunks before: then none has to be sought.

    Args:
        keys_ref, places_ref, counts_ref: from `list_contenders`.
        all_keys_ref, all_places_ref: `[batch, kv_heads, 1, chunks * chunk]`, out: those of all
            chunks.
        count_ref: `[batch, kv_heads, 1]` int32, out: how many there are.
        block: how many are moved at once.
    """
    _, kv_heads, chunks, _ = keys_ref.shape
    part, row = pl.program_id(0), pl.program_id(1)
    b, h, first = row // kv_heads, row % kv_heads, jnp.int32(0)
    nth = jnp.arange(launch.tile(chunks))
    counts = plt.load(counts_ref.at[b, h, nth], mask=nth < chunks, other=0)
    own = plt.load(counts_ref.at[b, h, part])
    before = jnp.sum(jnp.where(nth < part, counts, 0))

    def move(i: Any, _: Any) -> None:
        lane = i * block + jnp.arange(block)
        at = jnp.where(lane < own, before + lane, NO_ID)
        for ref, all_ref in ((keys_ref, all_keys_ref), (places_ref, all_places_ref)):
            moved = plt.load(ref.at[b, h, part, lane], mask=lane < own, other=0)
            plt.store(all_ref.at[b, h, first, at], moved, mask=lane < own)

    lax.fori_loop(0, lax.div(own + (block - 1), jnp.int32(block)), move, None)

    @pl.when(part == chunks - 1)
    def count_all() -> None:
        plt.store(count_ref.at[b, h, first], before + own)
