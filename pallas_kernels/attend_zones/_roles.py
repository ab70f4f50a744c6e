"""Which part a program of `attend_zones` takes, where missed rows come from host memory.

A missed row waits for the translation of its address. What has been translated is remembered by the
part of the GPU (one GPC of eight) that asked, for some 0.8 GB, and a launch may begin with any of
them. So there each processor takes the same part of the missed rows in every call
(docs/lab/host-rows.md, "What a single row waits for").
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.toolbox import launch

# Of a large GPU. On another one, other processors may take some of the parts in every call.
PROCESSORS = 132
# Of 4.3 GB, on an H200, a call finds what it wants remembered (docs/lab/host-rows.md); of 16 GB it
# does not, whoever reads, and to choose takes 1 to 2 us.
REMEMBERED_BYTES = 4_500_000_000


def by_processor(store: Any, missed: int) -> bool:
    """Whether programs are to choose: for rows on the host, not too many, of few enough parts.

    Args:
        store: `[layers, b, h, n, 2, d]`, all rows of all layers, since all are read in a step.
        missed: parts of missed rows.
    """
    aval = jax.typeof(store)
    on_host = aval.memory_space == jax.memory.Space.Host
    size = math.prod(aval.shape) * aval.dtype.itemsize
    few = missed <= PROCESSORS and size <= REMEMBERED_BYTES
    return on_host and few and backend.takes_assembly()


def choose_part(claims_ref: Any, missed: int, others: int, threads: int, interpret: bool) -> Array:
    """Take the part that this program takes, of `missed + others`: each is taken by one program.

    Args:
        claims_ref: `[missed + 1]` int32, zero before the first program begins: how many have asked
            for each part of the missed rows, and for any other one.
        missed, others: parts of missed rows, which are the first ones and no more than
            `PROCESSORS`, and all others.
        threads: of a program.
        interpret: whether the kernel is interpreted.
    """
    number = pl.program_id(0)
    # Those that begin at once, two on each processor; all parts of missed rows are among theirs.
    choosing = min(missed + others, 2 * PROCESSORS)
    # Two processors side by side are of one GPC, and the next two of the next one: where there are
    # enough, two share a part.
    pair = 2 if 2 * missed <= PROCESSORS else 1

    def ask(at: Any) -> Any:
        return launch.add_atomically(claims_ref, (at,), jnp.int32(1), interpret)

    def choose() -> Any:
        place = lax.div(_processor(number, threads, interpret), jnp.int32(pair))
        own = lax.div(place * missed, jnp.int32(PROCESSORS // pair))
        own = jnp.minimum(own, missed - 1)
        return lax.cond(ask(own) == 0, lambda: own, another)

    def another() -> Any:
        nth = ask(jnp.int32(missed))
        return lax.cond(nth < choosing - missed, lambda: missed + nth, what_is_left)

    def what_is_left() -> Any:
        # As many come here as parts of missed rows are not asked for by their own processors.
        def look(state: tuple[Any, Any]) -> tuple[Any, Any]:
            at, _ = state
            free = ask(at) == 0
            return jnp.where(free, at, lax.rem(at + 1, jnp.int32(missed))), free

        return lax.while_loop(lambda state: ~state[1], look, (jnp.int32(0), jnp.bool_(False)))[0]

    part: Array = lax.cond(number < choosing, choose, lambda: number)
    return part


def _processor(number: Any, threads: int, interpret: bool) -> Any:
    """Read the number of the processor that runs this program; interpreted, any number."""
    if interpret:
        return lax.rem(number * 89 + 5, jnp.int32(PROCESSORS))
    lane = jnp.arange(threads, dtype=jnp.int32)
    return jnp.max(launch.assembly("mov.u32 $0, %smid;", lane, dtype=jnp.int32))
