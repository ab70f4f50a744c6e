"""The quantised matrices of a Hugging Face folder: which there are, their floats, their levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from models.checkpoints.hf_layout import Layout, Method, Part, Tensors
from models.checkpoints.levels import Arrays, converted
from models.checkpoints.scaled_matrix import ScaledMatrix
from models.checkpoints.tensor_files import FLOATS, TensorFiles
from models.checkpoints.tensor_problems import refuse_problems
from models.errors import InputError
from models.formats import WeightFormat
from models.parameters import Shape

_WEIGHT, _BIAS = ".weight", ".bias"
# Of activations, and of keys and values, which are floats here.
_OF_ACTIVATIONS = {
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale"),
    *("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_zero_point"),
}


@dataclass(frozen=True)
class _Matrix:
    shape: Shape
    layout: Layout
    tensors: Mapping[str, str]  # their names by the last part


@dataclass(frozen=True)
class QuantisedMatrices:
    """The matrices that a folder holds as levels and scales.

    They have the names that their floats would have: ``model.layers.0.mlp.up_proj.weight``.

    Attributes:
      formats: of those that can be kept as levels.
      said: what they are, for people.
      taken: the tensors that are read by these names no more.
    """

    formats: Mapping[str, WeightFormat]
    said: str
    taken: frozenset[str]
    _files: TensorFiles
    _matrices: Mapping[str, _Matrix]

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the matrices."""
        return {name: matrix.shape for name, matrix in self._matrices.items()}

    def read(self, name: str) -> Float[np.ndarray, "out in"]:
        """Return a matrix as float32; InputError where its tensors contradict the config."""
        return self._read(name, levels=False).floats()

    def read_levels(self, name: str, format: WeightFormat) -> Arrays:
        """Return a matrix's levels in its format, or in one that it has in common with others.

        Raises:
          InputError: as `read` does; or what its own format cannot hold, whatever the config says.
        """
        own = self.formats[name]
        return converted(self._read(name, levels=True).arrays(own), own, format)

    def _read(self, name: str, levels: bool) -> ScaledMatrix:
        matrix = self._matrices[name]
        tensors: Tensors = {key: self._files.read(x) for key, x in matrix.tensors.items()}
        try:
            return matrix.layout.read(matrix.shape, tensors, levels)
        except InputError as error:
            raise InputError(f"{self._files.folder}: {name} {error}") from None


def find_quantised(
    files: TensorFiles, method: Method, shape_of: Callable[[str], Shape | None]
) -> QuantisedMatrices:
    """Find a folder's quantised matrices, and check their tensors' shapes and dtypes.

    Args:
      files: the folder's tensors.
      method: how its config.json says that they are quantised.
      shape_of: gives the shape of a parameter of one layer, or of the model, by its name; None
        where the model has none of that name.

    Raises:
      InputError: tensors that are missing, misshapen or of another dtype, all of them named; or a
        matrix that the config says nothing of.
    """
    matrices: dict[str, _Matrix] = {}
    formats: dict[str, WeightFormat] = {}
    problems: list[str] = []
    taken = {name for name in files.shapes if name.rpartition(".")[2] in _OF_ACTIVATIONS}
    for module in _modules(files, method):
        shape = shape_of(module + _WEIGHT)
        if shape is None or len(shape) != 2:
            continue  # an extra tensor, which is said with the others
        layout = method.layout(module)
        there = {
            name.rpartition(".")[2]: name
            for suffix in (*method.suffixes, "weight")
            if (name := f"{module}.{suffix}") in files.shapes
        }
        given = {key: files.dtypes[name] for key, name in there.items()}
        parts = layout.parts(shape, given)
        found = _problems(files, module, parts)
        problems += found
        tensors = {key: name for key, name in there.items() if key in parts}
        taken |= {*tensors.values()}
        if found:
            continue
        matrices[module + _WEIGHT] = _Matrix(shape, layout, tensors)
        own = layout.format(shape, given)
        if own is not None:
            formats[module + _WEIGHT] = own
        if shape_of(module + _BIAS) is None and _is_zero(files, module + _BIAS):
            taken.add(module + _BIAS)
    refuse_problems(str(files.folder), problems)
    said = dict.fromkeys(matrix.layout.said for matrix in matrices.values())
    return QuantisedMatrices(formats, " and ".join(said), frozenset(taken), files, matrices)


def _modules(files: TensorFiles, method: Method) -> list[str]:
    """List the modules that have a tensor of a quantised matrix."""
    found = set()
    for name, dtype in files.dtypes.items():
        module, _, last = name.rpartition(".")
        if last in method.suffixes or (last == "weight" and dtype not in FLOATS):
            found.add(module)
    return sorted(found)


def _problems(files: TensorFiles, module: str, parts: Mapping[str, Part]) -> list[str]:
    """Say what does not fit of one matrix."""
    problems = []
    for suffix, part in parts.items():
        name = f"{module}.{suffix}"
        shape, dtypes = part.kinds[0]
        expected = f"{shape} of {' or '.join(dtypes)}"
        if name not in files.shapes:
            if not part.optional:
                problems.append(f"missing {name} {expected}")
        elif not part.takes(files.shapes[name], files.dtypes[name]):
            given = f"{files.shapes[name]} of {files.dtypes[name]}"
            problems.append(f"misshapen {name}: expected {expected}, given {given}")
    return problems


def _is_zero(files: TensorFiles, name: str) -> bool:
    """Whether there is such a tensor, of zeros: some programs write biases that models lack."""
    if name not in files.shapes or files.dtypes[name] not in FLOATS:
        return False
    return not files.read(name).any()
