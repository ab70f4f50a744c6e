"""Compiles for CPUs in less than half the time: what tests run is run once, on little data."""

import functools
from typing import Any

import jax
from jax._src import compiler

# Without the newer emitters of fused loops two modules took 87 s for 127, on jax 0.10. Newer
# versions of XLA do not know the option.
OPTION = "xla_cpu_use_fusion_emitters"


def compile_quickly(quick: bool) -> None:
    """Turns quick compilation on or off, for all programs that are compiled from here on."""
    if quick == jax.config.read("jax_disable_most_optimizations"):
        return
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()  # They do not tell one way of compiling from the other.
    if _is_known():
        compiler.get_compile_options = _with_option if quick else _PLAIN


_PLAIN = compiler.get_compile_options


def _with_option(*arguments: Any, **settings: Any) -> Any:
    options = _PLAIN(*arguments, **settings)
    options.env_option_overrides = [*options.env_option_overrides, (OPTION, False)]
    return options


@functools.cache
def _is_known() -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={OPTION: False})()
    except jax.errors.JaxRuntimeError:
        return False
    return True
