"""One row's view of a kernel's refs: a row is a sequence and a kv head."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import backend as plt
from pallas_kernels.toolbox import launch
from pallas_kernels.types import NO_ID


class HeadView:
    """One row's view of the kernel's refs, and the loops that all parts share."""

    def __init__(self, row: Any, kv_heads: int, layer: Any, *, interpret: bool, block: int = 1):
        """Of a row by its number.

        Args:
            row: number among all sequences' kv heads.
            kv_heads: of the arrays.
            layer: which layer of stacks.
            interpret: whether the kernel is interpreted.
            block: how many elements `each` visits at once.
        """
        self.b, self.h, self.layer = row // kv_heads, row % kv_heads, layer
        self.block, self.interpret = block, interpret
        self.lane = jnp.arange(block)

    def load(self, ref: Any, *at: Any, mask: Any = None, stacked: bool = False) -> Any:
        """Load what the head has at `at`, zero where masked; of `layer` where refs are stacked."""
        prefix = (self.layer, self.b, self.h) if stacked else (self.b, self.h)
        other = None if mask is None else jnp.zeros((), ref.dtype)
        return plt.load(ref.at[*prefix, *at], mask=mask, other=other)

    def store(
        self, ref: Any, value: Any, *at: Any, mask: Any = None, stacked: bool = False
    ) -> None:
        """Store what the head has at `at`; what is masked, or past the last axis, is left out."""
        prefix = (self.layer, self.b, self.h) if stacked else (self.b, self.h)
        if mask is not None:
            # A place that was computed is held to the array, whatever it was computed of.
            mask = mask & (at[-1] >= 0) & (at[-1] < ref.shape[-1])
            # Interpreted, lanes that are masked still write if their place is one of the array.
            at = (*at[:-1], jnp.where(mask, at[-1], NO_ID))
        plt.store(ref.at[*prefix, *at], value, mask=mask)

    def add(self, ref: Any, value: Any, *at: Any) -> Any:
        """Add to one int32 atomically; returns what was there before."""
        value = jnp.asarray(value, jnp.int32)
        return launch.add_atomically(ref, (self.b, self.h, *at), value, self.interpret)

    def barrier(self) -> None:
        """Make the program's stores visible to all of its threads' later loads."""
        launch.barrier(self.interpret)

    def blocks(self, count: Any) -> Any:
        """Count the blocks that hold `count` elements."""
        return lax.div(count + (self.block - 1), jnp.int32(self.block))

    def each(self, count: Any, visit: Any, state: Any = None) -> Any:
        """visit(elements, which of them exist, state) over so many elements, block by block."""

        def of_block(i: Any, state: Any) -> Any:
            element = i * self.block + self.lane
            return visit(element, element < count, state)

        return lax.fori_loop(0, self.blocks(count), of_block, state)

    def search(self, ref: Any, size: int, values: list[Any], masks: list[Any]) -> list[Any]:
        """Find the last i with ref[i] <= value, for each lane, in a rising list of `size`.

        Of several vectors at once, so that none waits for the reads of another.
        """

        def halve(_: Any, bounds: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
            firsts, lasts = bounds
            middles = [(first + last + 1) >> 1 for first, last in zip(firsts, lasts, strict=True)]
            read = [self.load(ref, x, mask=mask) for x, mask in zip(middles, masks, strict=True)]
            right = [x <= value for x, value in zip(read, values, strict=True)]
            return (
                list(map(jnp.where, right, middles, firsts)),
                list(map(jnp.where, right, lasts, [x - 1 for x in middles])),
            )

        bounds = [jnp.zeros_like(x) for x in values], [jnp.full_like(x, size - 1) for x in values]
        return lax.fori_loop(0, (size - 1).bit_length(), halve, bounds)[0]
