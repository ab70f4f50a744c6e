"""Chooses an op's implementation, and tells what was chosen."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import jax

from pallas_kernels import backend
from pallas_kernels.explanation import Choice, Explanation, FallbackWarning
from pallas_kernels.modes import has_wide_floats, narrowed, standard_modes
from pallas_kernels.toolbox import launch

# The least compute capability that has the kernels' instructions.
OLDEST_GPU = (8, 0)

# The environment variable that chooses for a whole process.
VARIABLE = "WAVEJAX_IMPLEMENTATION"

Implementation = Literal["auto", "xla", "triton", "tpu", "mosaic_gpu"]

Result = TypeVar("Result")

# Of each thread its own, and part of `jit`'s cache key: a jitted caller is traced anew.
_in_force = jax.make_user_context(default_value=None)

# In the order of their first use. A dict, since it keeps that order.
_choices: dict[Choice, None] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def use_implementation(
    implementation: Implementation, *, by: str = "use_implementation"
) -> Iterator[None]:
    """Make all ops that are traced inside take one implementation.

    It holds for the thread that enters it, and wins over `WAVEJAX_IMPLEMENTATION`. An op's own
    argument `implementation` wins over it. It is part of `jax.jit`'s cache key: a jitted function
    that was traced outside is traced anew inside. A program that was compiled ahead of time
    (`jax.jit(f).lower(...).compile()`) stays as it is.

    Args:
        implementation: "xla", plain JAX; "triton", the kernels for GPUs; "tpu", those for TPUs,
            which few ops have; "mosaic_gpu", those by Mosaic GPU for Hopper, which two ops have;
            or "auto", the platform's best.
        by: who asks, for `explain`.

    Raises:
        ValueError: there is no implementation of that name.
        NotImplementedError: raised by an op inside, where a kernel does not support the case.

    Example:
        >>> with use_implementation("xla"):
        ...     output = jax.jit(step)(query)  # without kernels
    """
    _check(implementation, "use_implementation")
    with _in_force(_Request(implementation, by)):
        yield


def requested(implementation: Implementation | None) -> Implementation:
    """Return what holds: the argument, else the context manager's, else the variable's, or "auto".

    Args:
        implementation: an op's argument.

    Raises:
        ValueError: the environment variable names no implementation.
    """
    return _request(implementation).implementation


def takes_triton() -> bool:
    """Whether "auto" tries an op's Triton kernel on JAX's default device."""
    return not backend.is_for_tpu() and _unfit() is None


def explain() -> Explanation:
    """Tells what each op took, and why, since the process began or `forget` was called.

    An op is recorded when it is traced. A program that comes from `jit`'s cache adds nothing.

    Returns:
        One `Choice` for each op, implementation and reason, by first use. `str` makes a table.
    """
    with _lock:
        return Explanation(_choices)


def forget() -> None:
    """Empty what `explain` tells. Warnings that were given before are then given again."""
    with _lock:
        _choices.clear()


def call(
    op: str,
    implementation: Implementation | None,
    implementations: Mapping[str, Callable[..., Result]],
    *operands: object,
    on_hopper: Literal["triton", "mosaic_gpu"] = "triton",
    **settings: object,
) -> Result:
    """Call the implementation asked for; with "auto" the platform's best that supports the case.

    "auto" takes the kernel on a CUDA GPU of compute capability 8.0 or later, and on a TPU. It falls
    back to "xla" where the kernel raises NotImplementedError; on a GPU it warns of it once for each
    reason. On a TPU most ops have no kernel.

    Ops are computed in JAX's standard modes: a program that sets 64-bit types, or strict promotion,
    gets what others get. Only operands in float64 are computed in the program's own modes.

    The choice is made while the op is traced. A jitted caller keeps it for as long as it keeps the
    trace. `use_implementation` is part of `jit`'s cache key. The environment variable is not: set
    it before the process starts, or call `jax.clear_caches()` after a change.

    Args:
        op: the op's name, for messages.
        implementation: the op's argument; None leaves it to `use_implementation`, or else to the
            environment variable `WAVEJAX_IMPLEMENTATION`.
        implementations: the op's functions by name. "xla" is always there. One that was left out
            is of no use in this case.
        operands, settings: of the op.
        on_hopper: what "auto" tries first on a GPU of that kind.

    Raises:
        NotImplementedError: a named implementation does not exist, or does not support the case.
        ValueError: the environment variable names no implementation.
    """
    if has_wide_floats((operands, settings)):
        return _call(op, implementation, implementations, operands, settings, on_hopper)
    operands, settings = narrowed((operands, settings))
    with standard_modes():
        return _call(op, implementation, implementations, operands, settings, on_hopper)


def _call(
    op: str,
    implementation: Implementation | None,
    implementations: Mapping[str, Callable[..., Result]],
    operands: tuple[object, ...],
    settings: dict[str, Any],
    on_hopper: str,
) -> Result:
    """Do as `call` says, in the modes that are set."""
    request = _request(implementation)
    if request.implementation != "auto":
        if request.implementation not in implementations:
            known = ", ".join(sorted(implementations))
            raise NotImplementedError(
                f"{op}: no implementation {request.implementation!r}; there is: {known}"
            )
        result = implementations[request.implementation](*operands, **settings)
        _record(op, request.implementation, f"asked for by {request.by}")
        return result
    on_gpu = jax.default_backend() == "gpu"
    kernel = "tpu" if backend.is_for_tpu() else "triton"
    if kernel == "tpu" and kernel not in implementations:
        reason, lost = "there is no kernel for tpu", False
    elif kernel not in implementations:
        reason, lost = "plain JAX serves this case best", False
    elif kernel == "triton" and (unfit := _unfit()):
        reason, lost = unfit, on_gpu
    else:
        kernels = [on_hopper, kernel] if kernel == "triton" and _on_hopper() else [kernel]
        for name in dict.fromkeys(kernels):
            try:
                result = implementations[name](*operands, **settings)
            except NotImplementedError as error:
                reason, lost = str(error).removeprefix(f"{op}: "), kernel == "triton"
            else:
                _record(op, name, "the kernel supports this case")
                return result
    result = implementations["xla"](*operands, **settings)
    _record(op, "xla", reason, warn=lost)
    return result


def no_kernel(op: str) -> Callable[..., Any]:
    """Stands for the kernels that an op does not have yet: "auto" then tells of it, and warns.

    Args:
        op: the op's name.

    Returns:
        what to give `call` as its "triton": it raises NotImplementedError.
    """

    def refuse(*operands: Any, **settings: Any) -> Any:
        raise NotImplementedError(f"{op}: there is no kernel yet")

    return refuse


class _Request(NamedTuple):
    implementation: Implementation
    by: str


def _request(argument: Implementation | None) -> _Request:
    """Tell what is asked for, and where it was."""
    if argument is not None:
        return _Request(argument, "its argument")
    in_force: _Request | None = _in_force.value
    if in_force is not None:
        return in_force
    return _Request(_check(os.environ.get(VARIABLE) or "auto", VARIABLE), VARIABLE)


def _check(name: str, source: str) -> Implementation:
    known = get_args(Implementation)
    if name not in known:
        raise ValueError(f"{source}: no implementation {name!r}; give one of {', '.join(known)}")
    return cast(Implementation, name)


def _unfit() -> str | None:
    """Why JAX's default device takes no kernels; None where it does."""
    platform = jax.default_backend()
    if platform != "gpu":
        return f"there are no kernels for {platform}"
    capability = launch.compute_capability()
    if capability is None or capability >= OLDEST_GPU:
        return None
    has, least = (".".join(map(str, version)) for version in (capability, OLDEST_GPU))
    return f"the GPU has compute capability {has}; the kernels need {least}"


def _on_hopper() -> bool:
    capability = launch.compute_capability()
    return capability is not None and capability[0] == 9


def _record(op: str, implementation: str, reason: str, warn: bool = False) -> None:
    choice = Choice(op, implementation, jax.default_backend(), reason)
    with _lock:
        known = choice in _choices
        _choices[choice] = None
    if warn and not known:
        message = f"{op} runs in plain JAX on a GPU: {reason}"
        # Of the op's caller: below it are the op, `call`, `_call` and this function.
        warnings.warn(message, FallbackWarning, stacklevel=5)
