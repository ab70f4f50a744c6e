"""Picks that are not worth their way from the store: which, and what their clusters get back."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.numerics import from_ordered_bits
from pallas_kernels.toolbox import launch
from pallas_kernels.toolbox.head_view import HeadView


def worth_reading(
    row: HeadView, log_mass: Any, least_ref: Any, filling: Any, admission_ratio: float
) -> Any:
    """Which picks to read although they are not cached: bool `[block]`.

    Args:
        row: whose picks.
        log_mass: float32 `[block]`, theirs.
        least_ref: `[batch, kv_heads]` uint32, the least key of all picks.
        filling: bool, whether there are slots that have not been given away yet.
        admission_ratio: see `select_tokens`.
    """
    least = from_ordered_bits(row.load(least_ref))
    return (log_mass >= least + math.log(admission_ratio)) | filling


class Dropped:
    """Counts a row's picks that are not retrieved: a block a program, then all by one.

    Attributes:
        row: whose picks.
        through: `[batch, kv_heads, max_tokens]` int32, scratch: how many of a block's picks, up to
            each and with it, are dropped.
        blocks: `[batch, kv_heads, 3, parts]` int32, scratch: how many of a block's are; how many
            of those belong to a cluster whose picks begin in an earlier block; and that cluster.
    """

    def __init__(self, row: HeadView, through: Any, blocks: Any) -> None:
        self.row, self.through, self.blocks = row, through, blocks

    def count(self, left: Any, picks: tuple[Any, Any, Any], first: Any, last: Any) -> Any:
        """How many of its picks in this block a cluster gets back, at the first of them.

        Args:
            left: bool `[block]`, the picks that are dropped.
            picks: int32 `[block]` each: a pick's number in the list of picks, its cluster's number
                in the list of candidates, and its cluster.
            first: bool `[block]`, the first pick of each cluster.
            last: int32 `[block]`, where `first` is True the place of the cluster's last pick.
        """
        row, (i, number, cluster) = self.row, picks
        block, part = i.size, pl.program_id(0)
        dropped = left.astype(jnp.int32)
        through = jnp.cumsum(dropped)
        row.store(self.through, through, i, mask=i < self.through.shape[-1])
        row.barrier()
        end = jnp.minimum(last, part * block + (block - 1))
        back = row.load(self.through, end, mask=first) - (through - dropped)

        leads = i == part * block
        of_lead = jnp.sum(jnp.where(leads, number, 0))
        begun_earlier = jnp.sum((leads & ~first).astype(jnp.int32)) > 0
        before_first = (number == of_lead) & begun_earlier
        facts = (
            jnp.sum(dropped),
            jnp.sum(jnp.where(before_first, dropped, 0)),
            jnp.sum(jnp.where(leads, cluster, 0)),
        )
        for kind, fact in enumerate(facts):
            row.store(self.blocks, fact, jnp.int32(kind), part)
        return back

    def finish(self, remaining_ref: Any) -> Any:
        """Give clusters back what later blocks dropped of theirs; returns how many are dropped.

        Args:
            remaining_ref: `[batch, kv_heads, clusters]` int32; as the blocks' programs left it.
        """
        row, parts = self.row, self.blocks.shape[-1]
        nth = jnp.arange(launch.tile(parts))
        exists = nth < parts
        total, back, cluster = (
            row.load(self.blocks, jnp.int32(kind), nth, mask=exists) for kind in range(3)
        )
        # Several blocks may belong to one cluster. Each then writes the sum.
        alike = cluster[:, None] == cluster[None, :]
        back = jnp.sum(jnp.where(alike, back[None, :], 0), axis=1)
        gets = exists & (back > 0)
        kept = row.load(remaining_ref, cluster, mask=gets)
        row.barrier()
        row.store(remaining_ref, kept + back, cluster, mask=gets)
        return jnp.sum(total)
