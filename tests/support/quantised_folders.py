"""Writes quantised Hugging Face folders, without the safetensors package."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.tiny_models import CONFIGS, make_tensors

Parts = dict[str, np.ndarray]
Packer = Callable[[tuple[int, int], np.random.Generator], tuple[Parts, np.ndarray]]
"""From a matrix's shape: its tensors by the last parts of their names, and its numbers."""

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


def write_quantised(
    folder: Path,
    settings: Any,
    packer: Packer | Callable[[str], Packer | None],
    *,
    by_name: bool = False,
    shards: int = 1,
    change: Callable[[dict[str, np.ndarray]], None] = lambda _: None,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write a tiny Llama whose layers' matrices are random, and quantised.

    Args:
      folder: where to.
      settings: what its config.json says as quantization_config.
      packer: makes each matrix of the layers; or gives the packer of each matrix by its name.
      by_name: whether it is the latter.
      shards: the files of the model.
      change: changes the tensors before they are written.
      config: settings of config.json.

    Returns:
      the numbers of every tensor of the model, by the names of the floats.
    """
    model = CONFIGS["llama"] | SIZES | config
    floats = make_tensors(model)
    tensors: dict[str, np.ndarray] = {}
    for seed, (name, tensor) in enumerate(floats.items()):
        chosen: Any = packer(name) if by_name else packer  # type: ignore[call-arg, arg-type]
        in_layers = tensor.ndim == 2 and ".layers." in name
        if chosen is None or not (in_layers or by_name) or tensor.ndim != 2:
            tensors[name] = tensor
            continue
        parts, floats[name] = chosen(tensor.shape, np.random.default_rng(seed))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{last}": part for last, part in parts.items()}
    change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": settings}))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return floats
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [*tensors][shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return floats


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file by the format's definition, of dtypes that the package does not write too."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
