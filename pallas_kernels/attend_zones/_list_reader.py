"""Finding the retrieved rows of some clusters in the list of all of a row."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import backend as plt
from pallas_kernels.toolbox import launch
from pallas_kernels.types import NO_ID

# Places of the list that a program looks at at once: 16 registers of each of 128 threads.
MOST_LOOKED_AT = 2048


class ListReader:
    """A program of a row whose `refs` have `own` and `tokens`, `[batch, kv_heads, retrieved]`.

    Rows are listed by rising clusters, `own`. Where a token is `NO_ID` there is no row, and that
    may be anywhere in the list.
    """

    refs: Any
    b: Any
    h: Any

    def find_piece(self, first: Array, end: Array) -> tuple[Array, Array]:
        """Find the piece of the list with all rows of the clusters from `first` up to `end`.

        Returns:
            Its first place, and the place after its last; no row of others is between them. The
            piece is empty where there is none.
        """
        room = self.refs.tokens.shape[2]
        size = min(launch.tile(room), MOST_LOOKED_AT)

        def look(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            begin, last = found
            at = i * size + jnp.arange(size)
            where = self.b, self.h, at
            token = plt.load(self.refs.tokens.at[*where], mask=at < room, other=NO_ID)
            own = plt.load(self.refs.own.at[*where], mask=at < room, other=NO_ID)
            theirs = (token != NO_ID) & (own >= first) & (own < end)
            return (
                jnp.minimum(begin, jnp.min(jnp.where(theirs, at, room))),
                jnp.maximum(last, jnp.max(jnp.where(theirs, at + 1, 0))),
            )

        start = jnp.int32(room), jnp.int32(0)
        found: tuple[Array, Array] = lax.fori_loop(0, -(-room // size), look, start)
        return found
