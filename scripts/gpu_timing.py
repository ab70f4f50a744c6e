"""Times short GPU work: many calls in one compiled program, one after the other.

A call from Python costs 3 to 100 us of dispatch, a round of `fori_loop` about 9: more than most
of the ops take. So a program here holds many calls, unrolled, which XLA launches as one CUDA
graph, and several runs of it are queued before the host waits.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

WARM_UPS = 3  # The second call of a program whose operands are donated compiles once more.

# call(link, operands, state) -> (results, state)
Call = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of several measurements, the least and the most of them."""

    median: float
    least: float
    most: float


@functools.lru_cache(maxsize=2)
def chain(call: Call, calls: int) -> Callable[..., Any]:
    """Return a program of `calls` calls, each waiting for the one before.

    Takes (links, operands, state), of which the state is donated: each call is given the next of
    the links, going round. Returns (a sum over a sample of all results, the state at the end).
    """
    # Compiled alone, so that its kernels are traced once and not once a call.
    inner = jax.jit(call)

    def program(links: tuple[Any, ...], operands: Any, state: Any) -> tuple[Array, Any]:
        total = jnp.float32(0)
        for i in range(calls):
            results, state = inner(links[i % len(links)], operands, state)
            # Reads one element of every result, in one tiny kernel: XLA drops what no one reads.
            total = total + sum(_first(x) for x in jax.tree.leaves(results))
            # The next call's link comes out of the barrier with the total, so it must wait.
            links, total = lax.optimization_barrier((links, total))
        return total, state

    return jax.jit(program, donate_argnums=2)


def _first(x: Array) -> Array:
    return x[(0,) * x.ndim].astype(jnp.float32)


def time_calls(
    call: Call,
    operands: Any,
    state: Any = (),
    *,
    links: tuple[Any, ...],
    calls: int = 20,
    runs: int = 7,
    seconds: float = 0.25,
) -> tuple[Timing, Any]:
    """Seconds that one call takes, and the state after all of them.

    Args:
        call: takes a link, the operands and the state; returns results and the state.
        operands: a pytree of arrays.
        state: a pytree of arrays that every call updates in place; it is donated.
        links: what the calls take in turn and must depend on: the numbers of so many layers that
            the data of all of them do not fit in the GPU's 60 MB of cache, or a small operand.
        calls: in one program.
        runs: measurements.
        seconds: that all measurements together should take, about.
    """
    # Committed from the start, or the second call would compile again.
    links, state = jax.block_until_ready(jax.device_put((links, state), jax.devices()[0]))
    program = chain(call, calls)
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        sample, state = jax.block_until_ready(program(links, operands, state))
        once = time.perf_counter() - start
    queued = max(1, min(100, round(seconds / runs / max(once, 1e-6))))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(queued):
            sample, state = program(links, operands, state)
        jax.block_until_ready((sample, state))
        times.append((time.perf_counter() - start) / (queued * calls))
    return Timing(statistics.median(times), min(times), max(times)), state


def time_program(
    program: Callable[..., Any], operands: Sequence[Any], *, runs: int = 5, queued: int = 5
) -> float:
    """Seconds that a long program takes: its dispatch hides behind the run before it."""
    for _ in range(2):
        jax.block_until_ready(program(*operands))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(queued):
            result = program(*operands)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / queued)
    return statistics.median(times)


def copy_ceiling(gigabytes: float = 2.0) -> dict[str, float]:
    """Bytes a second, read and written, of large copies on the device: what memory can do."""
    size = int(gigabytes * 1e9) // 4
    x = jnp.arange(size, dtype=jnp.uint32)
    rates = {}
    for name, program in {
        "copy": jax.jit(jnp.copy),
        "elementwise": jax.jit(lambda x: x ^ 1),
    }.items():
        rates[name] = 2 * x.nbytes / time_program(program, (x,))
    return rates | {"best": max(rates.values())}


def empty_chain(calls: int = 20) -> Timing:
    """Return what the chain itself costs a call: the tiny kernel that reads the results."""

    def call(link: Array, operands: Array, state: Any) -> tuple[Array, Any]:
        return link, state

    return time_calls(call, (), links=(jnp.zeros(8, jnp.int32),), calls=calls)[0]


def device_facts() -> dict[str, str]:
    """Return what a measurement must say about where and when it was made."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
