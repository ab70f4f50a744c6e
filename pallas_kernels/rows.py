"""KV rows as values: how they are held, where they lie, and which of them the row cache holds."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

RowFormat = Literal["plain", "scaled"]

# In the row table: no slot, no token, no step. Elsewhere `NO_ID` stands for none. This one is less
# than every entry: the age of a slot, which is a difference of steps, is then the greatest, and the
# kernels tell it by its sign.
EMPTY = -1


def check_formats(reader: str, stored: "StoredRows") -> None:
    """Raise NotImplementedError where store and row cache are not of one format."""
    store, cache = stored
    if store.format != cache.format:
        raise NotImplementedError(
            f"{reader}: the store's rows are {store.format}, the row cache's {cache.format}; it "
            "wants one format"
        )


def is_held(entry: Array) -> Bool[Array, "..."]:
    """Say which entries of a row table, int32 of any shape, are not `EMPTY`."""
    return entry >= 0


class Rows(NamedTuple):
    """KV rows, and how they are held: a token's key and value for one kv head, side by side.

    Full attention has keys in one and values in another: of each row one vector, and no axis of 2.

    Frozen, and a pytree of one or two arrays. The format follows from the fields:

    - "plain": the numbers themselves.
    - "scaled": int8 levels, each times its vector's scale: `rounding.quantise` makes them, and
      `rounding.dequantise` the numbers again.

    Attributes:
        data: `[layers, batch, kv_heads, tokens, 2, head_dim]`, keys and values; may lie in
            `pinned_host` memory. In a row cache `slots` stand in place of `tokens`.
        scales: None; or, for "scaled", `[layers, batch, kv_heads, tokens, 2]` float32, one for
            each key and one for each value. Always on the device, also of rows in host memory: a
            row then crosses the bus as one aligned piece, whose length is a power of two.
    """

    data: Num[Array, "layers batch kv_heads tokens *vectors head_dim"]
    scales: Float[Array, "layers batch kv_heads tokens *vectors"] | None = None

    @property
    def format(self) -> RowFormat:
        """How a row is held."""
        return "plain" if self.scales is None else "scaled"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `data`."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `data`."""
        return self.data.dtype

    @property
    def width(self) -> int:
        """The numbers in one row: 2 * head_dim, or head_dim of keys or values alone."""
        return math.prod(self.data.shape[4:])

    @property
    def row_bytes(self) -> int:
        """The bytes that one row takes, its scales included."""
        scales = 0
        if self.scales is not None:
            scales = math.prod(self.scales.shape[4:]) * self.scales.dtype.itemsize
        return self.width * self.dtype.itemsize + scales

    def of_layer(self, layer: Int[Array, ""] | int) -> "Rows":
        """Take one layer's rows: of each array what lies at its first axis."""
        return Rows(self.data[layer], None if self.scales is None else self.scales[layer])


class SteadyRows(NamedTuple):
    """The steady zone's KV rows: the first tokens, and those that are not in the index yet.

    Attributes:
        sink: `[layers, batch, kv_heads, sinks, 2, head_dim]`, the first tokens' keys and values.
        sink_tokens: `[batch]` int32, how many there are; all for more than there is room for.
        window: `[layers, batch, kv_heads, window, 2, head_dim]`, the other rows, oldest first.
        window_tokens: `[batch]` int32, likewise.
    """

    sink: Float[Array, "layers batch kv_heads sinks 2 head_dim"]
    sink_tokens: Int[Array, " batch"]
    window: Float[Array, "layers batch kv_heads window 2 head_dim"]
    window_tokens: Int[Array, " batch"]


class StoredRows(NamedTuple):
    """The KV rows of the indexed tokens.

    Attributes:
        store: all of them in token order; may lie in `pinned_host` memory.
        cache: those in the row cache's slots, on the device. With no slots all rows are read from
            the store.
    """

    store: Rows
    cache: Rows


class KeptRows(NamedTuple):
    """KV rows of one kind that sequences hold, as `attend_appended` reads them.

    Attributes:
        keys: of keys and values side by side, `[layers, batch, kv_heads, room, 2, head_dim]`; or
            of keys alone, without the axis of 2.
        values: of values alone, as `keys`; None if `keys` has them.
        tokens: `[batch]` int32, how many rows are in use, the first ones; all for more than there
            is room for.
    """

    keys: Rows
    values: Rows | None
    tokens: Int[Array, " batch"]

    @property
    def room(self) -> int:
        """How many rows a sequence has room for."""
        return self.keys.shape[3]


class RowTable(NamedTuple):
    """Which row of the store each slot of the row cache holds; the cache's own fields.

    Without slots there is no cache: every row is read from the store.

    Attributes:
        slot_of_token: `[layers, batch, kv_heads, tokens]` int32, `EMPTY` where the row is not
            cached; without slots of no tokens.
        token_of_slot: `[layers, batch, kv_heads, slots]` int32, `EMPTY` where the slot has no
            row; the inverse of `slot_of_token`.
        last_used: `[layers, batch, kv_heads, slots]` int32, the step that last read the slot;
            `EMPTY` where it has no row.
        hits, misses: `[layers, batch, kv_heads]` uint32, rows that were found in the cache and that
            were not, in all steps; they wrap around at 2^32.
    """

    slot_of_token: Array
    token_of_slot: Array
    last_used: Array
    hits: Array
    misses: Array
