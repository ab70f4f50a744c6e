"""Calls of kernels whose programs each have a part of a row: a sequence's kv head."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.toolbox import launch


@dataclasses.dataclass(frozen=True)
class HeadCalls:
    """Calls kernels with so many programs a row; a row is a sequence and a kv head.

    Attributes:
        shape: sequences and kv heads.
        interpret: see `launch.call`.
    """

    shape: tuple[int, int]
    interpret: bool

    def of(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """Describe an array with so much for each row."""
        return jax.ShapeDtypeStruct((*self.shape, *shape), dtype)

    def call(self, kernel: Any, operands: Any, out_shape: Any, parts: int, **how: Any) -> Any:
        """`launch.call` with `parts` programs a row."""
        how = {"num_stages": 1, "interpret": self.interpret} | how
        return launch.call(kernel, operands, out_shape, (parts, math.prod(self.shape)), **how)

    def call_by_name(
        self,
        kernel: functools.partial[None],
        kind: Any,
        reads: dict[str, Any],
        in_place: dict[str, Any],
        writes: dict[str, Any],
        parts: int,
        **how: Any,
    ) -> dict[str, Any]:
        """Call a kernel that takes its refs as a named tuple, None for what is not there.

        Args:
            kernel: takes `kind`.
            kind: the named tuple.
            reads, in_place: operands; of those written in place the kernel gets the result's ref.
            writes: what else it writes, as `jax.ShapeDtypeStruct`.
            parts: programs a row.
            how: see `launch.call`.

        Returns:
            What is written, by name.
        """
        kept = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in in_place.items()}
        results, absent = kept | writes, dict.fromkeys(kind._fields)

        def with_names(
            before: tuple[Any, ...], read: tuple[Any, ...], written: tuple[Any, ...]
        ) -> None:
            del before  # What is written in place has a result's ref, too.
            named = zip((*reads, *results), (*read, *written), strict=True)
            kernel(kind(**absent | dict(named)))

        operands, places = (tuple(in_place.values()), tuple(reads.values())), range(len(in_place))
        how |= {"name": kernel.func.__name__, "aliases": {i: i for i in places}}
        [found] = self.call(with_names, operands, (tuple(results.values()),), parts, **how)
        return dict(zip(results, found, strict=True))
