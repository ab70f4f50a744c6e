"""Compiles for CPUs in less than half the time: what tests run is run once, on little data."""

import functools
from typing import Any

import jax
from jax._src import compiler

# Without the newer emitters of fused loops two modules took 87 s for 127, on jax 0.10; without a
# schedule for concurrency, whose gain a small program never sees, a tenth less than that. Some
# versions of XLA do not know one or the other.
QUICK: dict[str, bool | int] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}
# A program's code in one part: in several, for threads that two workers on two cores do not have, a
# module takes 50 s of processor time for 43. The code is the same, so it holds for every test.
ALWAYS: dict[str, bool | int] = {"xla_cpu_parallel_codegen_split_count": 1}


def compile_quickly(quick: bool) -> None:
    """Turns quick compilation on or off, for all programs that are compiled from here on."""
    chosen = compiler.get_compile_options is _with_chosen
    if chosen and quick == jax.config.read("jax_disable_most_optimizations"):
        return
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()  # They do not tell one way of compiling from the other.
    _chosen[:] = _known_options(quick)
    compiler.get_compile_options = _with_chosen


_PLAIN = compiler.get_compile_options
_chosen: list[tuple[str, bool | int]] = []


def _with_chosen(*arguments: Any, **settings: Any) -> Any:
    options = _PLAIN(*arguments, **settings)
    options.env_option_overrides = [*options.env_option_overrides, *_chosen]
    return options


@functools.cache
def _known_options(quick: bool) -> list[tuple[str, bool | int]]:
    """Give the options that this XLA knows."""
    options = ALWAYS | QUICK if quick else ALWAYS
    return [option for option in options.items() if _is_known(*option)]


def _is_known(option: str, value: bool | int) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True
