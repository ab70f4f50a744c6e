"""Compiles for CPUs in less than half the time: what tests run is run once, on little data."""

import functools
from typing import Any

import jax
from jax._src import compiler

# Without the newer emitters of fused loops two modules took 87 s for 127, on jax 0.10; without a
# schedule for concurrency, whose gain a small program never sees, a tenth less than that. Some
# versions of XLA do not know one or the other.
OPTIONS = "xla_cpu_use_fusion_emitters", "xla_cpu_enable_concurrency_optimized_scheduler"


def compile_quickly(quick: bool) -> None:
    """Turns quick compilation on or off, for all programs that are compiled from here on."""
    if quick == jax.config.read("jax_disable_most_optimizations"):
        return
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()  # They do not tell one way of compiling from the other.
    # Found out before it is replaced, since that compiles.
    compiler.get_compile_options = _with_options if quick and _known_options() else _PLAIN


_PLAIN = compiler.get_compile_options


def _with_options(*arguments: Any, **settings: Any) -> Any:
    options = _PLAIN(*arguments, **settings)
    options.env_option_overrides = [*options.env_option_overrides, *_known_options()]
    return options


@functools.cache
def _known_options() -> tuple[tuple[str, bool], ...]:
    """Give the options that this XLA knows, each to be off."""
    return tuple((option, False) for option in OPTIONS if _is_known(option))


def _is_known(option: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: False})()
    except jax.errors.JaxRuntimeError:
        return False
    return True
