"""An attention's own choice between plain JAX and the kernels, for all ops of its methods."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar, get_args, runtime_checkable

from models.errors import InputError
from pallas_kernels import Implementation, use_implementation

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@runtime_checkable
class Choosing(Protocol):
    """An attention with a setting of its own."""

    @property
    def implementation(self) -> Implementation | None:
        """How its ops run; None leaves it to the context manager and the variable."""


Owner = TypeVar("Owner", bound=Choosing)


def check_implementation(implementation: str | None) -> None:
    """Raise InputError where there is no implementation of that name."""
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise InputError(
            f"`implementation` is {implementation!r}; it must be one of {', '.join(known)}, or None"
        )


@contextlib.contextmanager
def implementation_of(attention: Choosing) -> Iterator[None]:
    """Make all ops that are traced inside run as the attention says, if it says anything."""
    own = attention.implementation
    if own is None:
        yield
        return
    with use_implementation(own, by=f"{type(attention).__name__}.implementation"):
        yield


def by_own_implementation(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Make a method of an attention run its ops by `implementation_of` that attention."""

    @functools.wraps(method)
    def chosen(self: Owner, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        with implementation_of(self):
            return method(self, *arguments, **named)

    return chosen
