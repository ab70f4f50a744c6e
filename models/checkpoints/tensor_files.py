"""The safetensors files of a Hugging Face folder: what tensors there are, and their numbers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from models.checkpoints.model_path import weights_hint
from models.errors import InputError
from models.parameters import Shape
from models.paths import is_file, refuse_stand_in

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of tensors that are numbers by themselves, by their names in a file."""

FLOATS_OF_8_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Dtypes that safetensors has no NumPy arrays of."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder, of which only headers have been read.

    Attributes:
      folder: where they are.
      shapes: by the tensors' names.
      dtypes: the same, as safetensors names them: "BF16", "I32", "F8_E4M3".
    """

    folder: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    _file_of: Mapping[str, tuple[Path, Any]]

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Read one tensor; InputError if it cannot be read."""
        path, file = self._file_of[name]
        try:
            if self.dtypes[name] in FLOATS_OF_8_BITS:
                return self._read_floats_of_8_bits(name, path)
            return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder}: tensor {name} cannot be read: {error}") from None

    def of_floats(self, names: Mapping[str, Any]) -> None:
        """Raise InputError where a tensor of these names is of no dtype of `FLOATS`."""
        for name in names:
            if self.dtypes[name] not in FLOATS:
                raise InputError(
                    f"{self._file_of[name][0]}: tensor {name} is stored as {self.dtypes[name]}; "
                    f"supported are: {', '.join(FLOATS)}"
                )

    def _read_floats_of_8_bits(self, name: str, path: Path) -> Shaped[np.ndarray, "..."]:
        data, header = _header(path)
        shape = self.shapes[name]
        numbers = np.fromfile(
            path,
            FLOATS_OF_8_BITS[self.dtypes[name]],
            math.prod(shape),
            offset=data + header[name]["data_offsets"][0],
        )
        if numbers.size != math.prod(shape):
            raise InputError(f"{path} became shorter while it was read")
        return numbers.reshape(shape)


def open_tensor_files(folder: Path) -> TensorFiles:
    """Read the headers of a folder's safetensors files.

    Raises:
      InputError: files missing, truncated or corrupt, or a tensor in more than one.
    """
    file_of: dict[str, tuple[Path, Any]] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    for path in _paths(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in file_of:
                raise InputError(f"{folder}: tensor {name} stands in more than one file")
            tensor = file.get_slice(name)
            file_of[name] = path, file
            shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    return TensorFiles(folder, shapes, dtypes, file_of)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        refuse_stand_in(path)
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def _paths(folder: Path) -> list[Path]:
    if is_file(folder / _SINGLE):
        return [folder / _SINGLE]
    if is_file(folder / _INDEX):
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / _INDEX} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not is_file(folder / name)]
        if missing:
            raise InputError(
                f"{folder} lacks {len(missing)} of its {len(names)} tensor files: "
                + ", ".join(missing[:10])
                + "; download them to the same folder"
            )
        return [folder / name for name in names]
    raise InputError(
        f"{folder} has config.json, but neither {_SINGLE} nor {_INDEX}{weights_hint(folder)}"
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        refuse_stand_in(path)
        raise InputError(
            f"{path} is truncated or corrupt ({error}); download or copy it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes begin in a file that safetensors has checked, and a header.

    The layout is that of the safetensors format: the header's length in 8 bytes, little-endian, the
    header as JSON, the bytes.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))
