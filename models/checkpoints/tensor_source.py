"""Fills the parameter tree from a file that stores one tensor a layer, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Params, Path, Shape, nest, parameter_shapes

Progress = Callable[[int, int], None]
"""Called with the number of tensors read, and of all tensors to read."""

_NAMED_PROBLEMS = 10
_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSource:
    """The tensors of one checkpoint and where each belongs.

    Attributes:
      where: the checkpoint's path, for messages.
      config: the model's sizes.
      names: the file's name of every parameter, with ``{layer}`` where it is stored layer by layer.
      shapes: shape of every tensor in the file.
      read: gives a tensor, in any floating dtype, in the decoder's layout.
      harmless: whether a tensor that no parameter needs may be ignored.
      copies: pairs of tensors that must be equal, the second being read for nothing else.
    """

    where: str
    config: ModelConfig
    names: dict[Path, str]
    shapes: dict[str, Shape]
    read: Callable[[str], Shaped[np.ndarray, "..."]]
    harmless: Callable[[str], bool]
    copies: tuple[tuple[str, str], ...] = field(default=())

    def check(self) -> None:
        """Raise one InputError that names every missing, extra and misshapen tensor."""
        if self.config.num_layers > len(self.shapes):
            raise InputError(
                f"{self.where}: its config says {self.config.num_layers} layers, but it has only "
                f"{len(self.shapes)} tensors"
            )
        expected: dict[str, Shape] = {}
        for path, shape in parameter_shapes(self.config).items():
            for name in self._names_of(path):
                expected[name] = shape[1:] if _is_stacked(path) else shape
        for original, copy in self.copies:
            expected[copy] = expected[original]
        report_problems(
            self.where,
            expected,
            {name: shape for name, shape in self.shapes.items() if not self.harmless(name)},
        )

    def load(self, dtype: str, progress: Progress | None = None) -> Params:
        """Read all parameters, as `Decoder.init` lays them out, as arrays of `dtype`.

        Holds the parameters and one tensor in memory at a time; where JAX's device is not the host,
        one stack of layers instead of all parameters.
        """
        target = parameter_dtype(dtype)
        self._check_copies()
        shapes = parameter_shapes(self.config)
        total = sum(len(self._names_of(path)) for path in shapes)
        done = 0
        leaves: dict[Path, Any] = {}
        for path, shape in shapes.items():
            stack = _empty_aligned(shape, target)
            parts = stack if _is_stacked(path) else stack[None]
            for part, name in zip(parts, self._names_of(path), strict=True):
                with np.errstate(over="ignore"):  # refused below, by name
                    part[...] = self.read(name)
                done += 1
                if progress is not None:
                    progress(done, total)
            refuse_overflow(f"{self.where}: {'.'.join(path)}", stack)
            leaves[path] = jax.device_put(stack)
        return {"params": nest(leaves)}

    def _names_of(self, path: Path) -> list[str]:
        if not _is_stacked(path):
            return [self.names[path]]
        return [self.names[path].format(layer=layer) for layer in range(self.config.num_layers)]

    def _check_copies(self) -> None:
        for original, copy in self.copies:
            if not np.array_equal(self.read(original), self.read(copy)):
                raise InputError(
                    f"{self.where}: the config ties embeddings, yet {copy} differs from "
                    f"{original}; set tie_word_embeddings to false in config.json to use both"
                )


def report_problems(where: str, expected: dict[str, Shape], given: dict[str, Shape]) -> None:
    """Raise one InputError naming what is missing, extra or misshapen in `given`; or nothing."""
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in given]
    problems += [f"extra {name} {given[name]}" for name in given if name not in expected]
    problems += [
        f"misshapen {name}: expected {shape}, given {given[name]}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if not problems:
        return
    more = len(problems) - _NAMED_PROBLEMS
    listed = "; ".join(problems[:_NAMED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    raise InputError(
        f"{where}: {len(problems)} of its tensors do not fit the model that its config describes: "
        f"{listed}"
    )


def parameter_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of that name; InputError unless bfloat16, float16 or float32."""
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32")
    return jnp.dtype(name)


def refuse_overflow(what: str, array: Any) -> None:
    """InputError if float16, which ends at 65504, could not hold a number of `array`."""
    if array.dtype == np.float16 and bool(np.isinf(array).any()):
        raise InputError(f"{what} holds numbers too large for float16; use bfloat16 or float32")


def _is_stacked(path: Path) -> bool:
    return path[0] == "layers"


def _empty_aligned(shape: Shape, dtype: np.dtype[Any]) -> Shaped[np.ndarray, "..."]:
    """Return an uninitialised array that JAX uses in place on a CPU.

    It wants an alignment of 64 bytes.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
