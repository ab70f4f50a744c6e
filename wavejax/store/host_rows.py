"""KV rows in the host's own memory, gathered there for the device."""

import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int, Num

from pallas_kernels.types import NO_ID

_LEAST_WIDTH = 16  # KV rows of a head in the smallest block


class HostRows:
    """All indexed tokens' KV rows, in the host's memory; changed in place.

    Attributes:
        rows: `[layers, batch, kv_heads, tokens, 2, head_dim]`, by store row.
    """

    def __init__(self, shape: tuple[int, ...], widest: int, dtype: DTypeLike):
        """Make room for KV rows, and for blocks of at most `widest` of each head.

        Args:
            shape: `[layers, batch, kv_heads, tokens, 2, head_dim]`.
            widest: the most store rows that `gather` lists for a head.
            dtype: of the KV rows.
        """
        self.rows = np.zeros(shape, dtype)
        self._widest = widest
        _, batch, kv_heads, _, *row = shape
        block = (batch * kv_heads * widest, *row)
        # One to fill while the last one may be on its way.
        self._blocks = [np.zeros(block, dtype), np.zeros(block, dtype)]
        self._coming: list[tuple[tuple[int | slice, ...], Array]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    def put(self, where: tuple[int | slice, ...], rows: Array) -> None:
        """Write `rows` to `self.rows[where]`, once they are there: waits for those put before."""
        rows.copy_to_host_async()
        self.take_in()
        self._coming.append((where, rows))

    def take_in(self) -> None:
        """Wait for all rows that were put."""
        for where, rows in self._coming:
            self.rows[where] = np.asarray(rows)
        self._coming.clear()

    def of(self, layer: int, sequence: int) -> Num[np.ndarray, "kv_heads tokens 2 head_dim"]:
        """View one sequence's KV rows in one layer, by store row: those put, once they are there.

        Args:
            layer: which layer.
            sequence: whose.
        """
        self.take_in()
        return self.rows[layer, sequence]

    def gather(
        self, layer: int, tokens: Int[np.ndarray, "batch kv_heads missed"]
    ) -> Num[np.ndarray, "batch kv_heads width 2 head_dim"]:
        """Read one layer's KV rows: of each head those listed, NO_ID after the last one.

        Args:
            layer: which layer.
            tokens: int32 store rows, for each head.

        Returns:
            the KV rows, as many a head as the longest list has, rounded up to one of few widths:
            each is a program. Anything past a list's end. Good until the next but one call.
        """
        self.take_in()
        batch, kv_heads, room = tokens.shape
        longest = int((tokens != NO_ID).sum(axis=-1).max(initial=0))
        width = min(room, max(_LEAST_WIDTH, 2 ** (longest - 1).bit_length()))
        stored = self.rows[layer].reshape(-1, *self.rows.shape[4:])
        first = np.arange(batch * kv_heads).reshape(batch, kv_heads, 1) * self.rows.shape[3]
        listed = tokens[..., :width]
        places = first + np.where(listed == NO_ID, 0, listed)
        self._blocks.reverse()
        block = self._blocks[0][: places.size]
        # "clip" only because numpy else makes a copy first; nothing is out of bounds.
        np.take(stored, places.reshape(-1), axis=0, out=block, mode="clip")
        return block.reshape(batch, kv_heads, width, *block.shape[1:])
