"""Fills the parameter tree from a file that stores one tensor a layer, tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from models.checkpoints.levels import Arrays, quantise
from models.checkpoints.packed_tensors import PackedTensors
from models.checkpoints.tensor_problems import report_problems
from models.config import ModelConfig
from models.errors import InputError
from models.formats import WeightFormat, formats_of_dtype, matrices
from models.parameters import Params, Path, Shape, nest, parameter_shapes
from models.quantised import QuantisedMatrix

Progress = Callable[[int, int], None]
"""Called with the number of tensors read, and of all tensors to read."""

WEIGHT_DTYPES = ("model", "int8", "int4", "packed")

_ALIGNMENT = 64
_QUANTISED_AT_ONCE = 2**22  # numbers


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
      packed: what it holds in 8 or 4 bits; None for a file that has none.
      more_notes: what is to be said of the file besides its weights.
    """

    where: str
    config: ModelConfig
    names: dict[Path, str]
    shapes: dict[str, Shape]
    read: Callable[[str], Shaped[np.ndarray, "..."]]
    harmless: Callable[[str], bool]
    copies: tuple[tuple[str, str], ...] = field(default=())
    packed: PackedTensors | None = None
    more_notes: tuple[str, ...] = ()

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

    def formats(self, weight_dtype: str) -> dict[Path, WeightFormat]:
        """Give the formats that `load` keeps matrices in, by their paths; read no data.

        Raises:
          InputError: no such `weight_dtype`, or "packed" of a file that packs nothing.
        """
        check_weight_dtype(weight_dtype)
        if weight_dtype != "packed":
            return formats_of_dtype(self.config, weight_dtype)
        if self.packed is None:
            raise InputError(
                f"{self.where} holds floats; `weight_dtype='packed'` keeps what a GGUF file or a "
                "quantised folder holds in 8 or 4 bits: give `weight_dtype='int8'` or "
                "`weight_dtype='int4'`"
            )
        columns = {path: shape[-1] for path, shape in parameter_shapes(self.config).items()}
        formats = self.packed.formats_of(self._matrix_names(), columns)
        if not formats and self.packed.said is None:
            raise InputError(
                f"{self.where} holds no matrix that can stay in 8 or 4 bits: give "
                "`weight_dtype='int8'`, `weight_dtype='int4'`, or leave it out"
            )
        return formats

    def notes(self, weight_dtype: str) -> tuple[str, ...]:
        """Say what comes of a quantised folder's weights, and what else there is to say of it."""
        if self.packed is None or self.packed.said is None:
            return self.more_notes
        kept = self.formats("packed")
        return (self.packed.note(weight_dtype, self._matrix_names(), kept), *self.more_notes)

    def load(
        self, dtype: str, progress: Progress | None = None, weight_dtype: str = "model"
    ) -> Params:
        """Read all parameters, as `Decoder.init` lays them out, as arrays of `dtype`.

        Matrices are quantised one by one, as they are read, if `weight_dtype` says so. Holds the
        parameters and one tensor in memory at a time; where JAX's device is not the host, one stack
        of layers instead of all parameters.
        """
        target, formats = parameter_dtype(dtype), self.formats(weight_dtype)
        self._check_copies()
        shapes = parameter_shapes(self.config)
        total = sum(len(self._names_of(path)) for path in shapes)
        done = 0
        leaves: dict[Path, Any] = {}
        for path, shape in shapes.items():
            format, where = formats.get(path), f"{self.where}: {'.'.join(path)}"
            sizes = {"floats": (shape, target)} if format is None else format.arrays(shape)
            stacks = {name: _empty_aligned(*size) for name, size in sizes.items()}
            for layer, name in enumerate(self._names_of(path)):
                # Of a parameter that is not stacked there is one.
                parts = {key: x[layer] if _is_stacked(path) else x for key, x in stacks.items()}
                if format is None:
                    with np.errstate(over="ignore"):  # refused below, by name
                        parts["floats"][...] = self.read(name)
                elif weight_dtype == "packed":
                    self._keep(name, format, parts)
                else:
                    self._quantise(name, format, parts, target)
                done += 1
                if progress is not None:
                    progress(done, total)
            if format is None:
                refuse_overflow(where, stacks["floats"])
                leaves[path] = jax.device_put(stacks["floats"])
            else:
                arrays = {key: jax.device_put(x) for key, x in stacks.items()}
                leaves[path] = QuantisedMatrix(**arrays, columns=shape[-1], dtype=target)
        return {"params": nest(leaves)}

    def _keep(self, name: str, format: WeightFormat, parts: Arrays) -> None:
        """Read a tensor's own levels into the arrays of a matrix.

        Raises:
          InputError: a scale or a minimum is not finite.
        """
        assert self.packed is not None
        for key, array in self.packed.read(name, format).items():
            if not np.isfinite(array).all():
                raise InputError(
                    f"{self.where}: {name} has {key} that are not finite: check the file, or give "
                    "`weight_dtype='model'` to see what comes of it"
                )
            parts[key][...] = array

    def _quantise(
        self, name: str, format: WeightFormat, parts: Arrays, target: np.dtype[Any]
    ) -> None:
        """Quantise a tensor into the arrays of a matrix, some rows at a time.

        Raises:
          InputError: a number is not finite, or too large for float16 where that is the target.
        """
        matrix = self.read(name)
        rows = max(1, _QUANTISED_AT_ONCE // matrix.shape[-1])
        for start in range(0, len(matrix), rows):
            block = slice(start, start + rows)
            for key, array in quantise(matrix[block], format).items():
                parts[key][block] = array
        largest = np.abs(parts["scales"].astype(np.float32)).max()
        if not np.isfinite(largest):
            raise InputError(
                f"{self.where}: {name} holds NaN or infinity, which no level stands for: check the "
                "file, or give `weight_dtype='model'` to see what comes of it"
            )
        most = largest * (127 if format.bits == 8 else 8)
        with np.errstate(over="ignore"):
            refuse_overflow(f"{self.where}: {name}", most.astype(target))

    def _matrix_names(self) -> dict[Path, list[str]]:
        return {path: self._names_of(path) for path in matrices(self.config)}

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


def parameter_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of that name; InputError unless bfloat16, float16 or float32."""
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32")
    return jnp.dtype(name)


def check_weight_dtype(name: str) -> None:
    """Raise InputError unless it is one of `WEIGHT_DTYPES`."""
    if name not in WEIGHT_DTYPES:
        raise InputError(
            f"`weight_dtype` is {name!r}; choose {', '.join(WEIGHT_DTYPES[:-1])} or "
            f"{WEIGHT_DTYPES[-1]}"
        )


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
