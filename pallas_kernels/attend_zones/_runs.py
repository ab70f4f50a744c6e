"""A small kernel: where the retrieved rows of each cluster begin in the list of all of a row.

Rows are listed by rising clusters. Where a token is `NO_ID` there is no row, and that may be
anywhere in the list, also between the rows of a cluster.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend as plt
from pallas_kernels.attend_zones._list_reader import MOST_LOOKED_AT
from pallas_kernels.toolbox import launch
from pallas_kernels.types import NO_ID

# Places of a program.
BLOCK = 256


class RunsOperands(NamedTuple):
    """The kernel's operands, in order.

    Attributes:
        tokens: as in `Picks`.
        own: `clusters` of `Correction`.
    """

    tokens: Any
    own: Any


class Runs(NamedTuple):
    """The kernel's results, in order.

    Attributes:
        begins: `[batch, kv_heads, clusters]` int32, the place of each cluster's first row; anything
            for a cluster without.
        end: `[batch, kv_heads]` int32, the place after the last row.
    """

    begins: Any
    end: Any


def find_runs(refs: RunsOperands, out: Runs) -> None:
    """Find the first rows of clusters in a block of a row's list, and the list's end."""
    _, kv_heads, room = refs.tokens.shape
    b, h = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    at = pl.program_id(0) * BLOCK + jnp.arange(BLOCK)

    def load(ref: Any, at: Array, mask: Array) -> Array:
        return plt.load(ref.at[b, h, at], mask=mask, other=NO_ID)

    own = load(refs.own, at, at < room)
    is_row = load(refs.tokens, at, at < room) != NO_ID

    def look_back(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, looks, first = carry
        looks &= before >= 0
        found = looks & (load(refs.tokens, before, looks) != NO_ID)
        same = found & (load(refs.own, before, looks) == own)
        return before - 1, looks & ~found, first & ~same

    start = at - 1, is_row, is_row
    *_, first = lax.while_loop(
        lambda carry: jnp.max(carry[1].astype(jnp.int32)) > 0, look_back, start
    )
    plt.store(out.begins.at[b, h, jnp.where(first, own, NO_ID)], at, mask=first)

    size = min(launch.tile(room), MOST_LOOKED_AT)

    def look(i: Array, end: Array) -> Array:
        at = i * size + jnp.arange(size)
        is_row = load(refs.tokens, at, at < room) != NO_ID
        return jnp.maximum(end, jnp.max(jnp.where(is_row, at + 1, 0)))

    @pl.when(pl.program_id(0) == 0)
    def write_end() -> None:
        plt.store(out.end.at[b, h], lax.fori_loop(0, -(-room // size), look, jnp.int32(0)))
