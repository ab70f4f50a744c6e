"""An attention's own choice between plain JAX and the kernels, for all ops of its methods."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar, get_args

from models.errors import InputError
from pallas_kernels import Implementation, use_implementation
from wavejax.attention.protocol import Attention

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


Owner = TypeVar("Owner", bound=Attention)


def check_implementation(implementation: str | None) -> None:
    """Raise InputError where there is no implementation of that name."""
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise InputError(
            f"`implementation` is {implementation!r}; it must be one of {', '.join(known)}, or None"
        )


@contextlib.contextmanager
def implementation_of(attention: Attention) -> Iterator[None]:
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
