"""What `pallas_kernels.explain` returns, and the warning of a kernel that was not taken."""

from dataclasses import dataclass, fields


class FallbackWarning(UserWarning):
    """On a GPU an op runs in plain JAX, since its kernel does not support the case.

    Given once for each op and reason. To make it an error:
    `warnings.simplefilter("error", pallas_kernels.FallbackWarning)`.
    """


@dataclass(frozen=True)
class Choice:
    """What one op took when it was traced, and why.

    Attributes:
        op: the op's name.
        implementation: what it took, "xla", "triton", "tpu" or "mosaic_gpu".
        platform: JAX's default backend, such as "gpu" or "cpu".
        reason: why it took that, in words.
    """

    op: str
    implementation: str
    platform: str
    reason: str


class Explanation(tuple[Choice, ...]):
    """What the ops took, by first use; `str` makes a table of it."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return a table of one choice a line, under a line of titles."""
        names = [field.name for field in fields(Choice)]
        rows = [names, *([getattr(choice, name) for name in names] for choice in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)
