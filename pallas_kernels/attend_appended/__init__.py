"""The op `attend_appended`. Its meaning is in `reference.py`, its kernel is in `triton.py`."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attend_appended import reference, triton
from pallas_kernels.dispatch import Implementation
from pallas_kernels.types import KeptRows


def attend_appended(
    query: Float[Array, "tokens kv_heads group head_dim"],
    own: KeptRows,
    others: Sequence[KeptRows],
    count: Int[Array, ""] | int,
    sequence: Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Full attention of tokens that follow a sequence, whose own rows are written already.

    New token i attends to all rows of `others` in use, to those of `own`, and to the rows of new
    tokens up to its own, which lie behind `own`'s: it sees the first `own.tokens + i + 1`.

    Args:
        query: the new tokens', grouped by the kv head that they share.
        own: what the new tokens were written to; its `tokens` do not count them. All its room at
            most is attended to.
        others: what else the sequence holds. What lies past the rows in use may be anything, NaN
            included, scales too; in `own` and here.
        count: int32, how many of the new tokens there are: the first ones.
        sequence: int32, whose tokens they are.
        layer: int32, which layer of the stacks.
        scale: multiplies every product; 1/sqrt(head_dim) for most models.
        implementation: see `pallas_kernels.dispatch.call`.

    Returns:
        in the query's dtype, the softmax-weighted mean of the values; anything past `count`.
    """
    return dispatch.call(
        "attend_appended",
        implementation,
        {"xla": reference.attend_appended, "triton": triton.attend_appended},
        query,
        own,
        tuple(others),
        count,
        sequence,
        layer,
        scale=scale,
    )


def has_kernel(
    query: Float[Array, "tokens kv_heads group head_dim"],
    own: KeptRows,
    others: Sequence[KeptRows],
) -> bool:
    """Whether `attend_appended` is by its kernel here: in plain JAX it copies all rows.

    By default in 16 bits: in float32 the kernel does without the matrix units, and was not timed.
    Asked for by name it always is, and raises for what it does not know.

    Args:
        query, own, others: as of `attend_appended`; shapes and dtypes alone are looked at.

    Raises:
        ValueError: the environment variable names no implementation.
    """
    asked = dispatch.requested(None)
    if asked != "auto":
        return asked == "triton"
    if query.dtype.itemsize > 2 or not dispatch.takes_triton():
        return False
    try:
        triton.check(query, own, others)
    except NotImplementedError:
        return False
    return True
