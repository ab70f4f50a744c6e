"""A Hugging Face folder as a model: config.json and one or many safetensors files."""

import json
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from models.checkpoints.hf_config import config_from_hf
from models.checkpoints.model_path import weights_hint
from models.checkpoints.tensor_source import TensorSource
from models.errors import InputError
from models.parameters import Path, Shape
from models.paths import is_file, refuse_stand_in

_NAMES: dict[Path, str] = {
    ("embedding",): "model.embed_tokens.weight",
    ("layers", "attention_norm"): "model.layers.{layer}.input_layernorm.weight",
    ("layers", "query"): "model.layers.{layer}.self_attn.q_proj.weight",
    ("layers", "key"): "model.layers.{layer}.self_attn.k_proj.weight",
    ("layers", "value"): "model.layers.{layer}.self_attn.v_proj.weight",
    ("layers", "query_bias"): "model.layers.{layer}.self_attn.q_proj.bias",
    ("layers", "key_bias"): "model.layers.{layer}.self_attn.k_proj.bias",
    ("layers", "value_bias"): "model.layers.{layer}.self_attn.v_proj.bias",
    ("layers", "query_norm"): "model.layers.{layer}.self_attn.q_norm.weight",
    ("layers", "key_norm"): "model.layers.{layer}.self_attn.k_norm.weight",
    ("layers", "output"): "model.layers.{layer}.self_attn.o_proj.weight",
    ("layers", "mlp_norm"): "model.layers.{layer}.post_attention_layernorm.weight",
    ("layers", "gate"): "model.layers.{layer}.mlp.gate_proj.weight",
    ("layers", "up"): "model.layers.{layer}.mlp.up_proj.weight",
    ("layers", "down"): "model.layers.{layer}.mlp.down_proj.weight",
    ("final_norm",): "model.norm.weight",
    ("unembedding",): "lm_head.weight",
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


def open_safetensors(folder: FilePath) -> TensorSource:
    """Read a Hugging Face folder's config and tensor headers and check that they agree.

    Raises:
      InputError: files missing, truncated or corrupt, an unknown architecture, or tensors that do
        not fit the config.
    """
    config_json = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = config_from_hf(config_json, read_json(generation) if is_file(generation) else None)
    file_of: dict[str, Any] = {}
    shapes: dict[str, Shape] = {}
    for path in _tensor_files(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in file_of:
                raise InputError(f"{folder}: tensor {name} stands in more than one file")
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _DTYPES:
                raise InputError(
                    f"{path}: tensor {name} is stored as {tensor.get_dtype()}; supported are: "
                    + ", ".join(_DTYPES)
                )
            file_of[name], shapes[name] = file, tuple(tensor.get_shape())

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        try:
            return file_of[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder}: tensor {name} cannot be read: {error}") from None

    embedding, unembedding = _NAMES["embedding",], _NAMES["unembedding",]
    source = TensorSource(
        where=str(folder),
        config=config,
        names=_NAMES,
        shapes=shapes,
        read=read,
        # transformers once stored RoPE's frequencies, which the config determines.
        harmless=lambda name: name.endswith("rotary_emb.inv_freq"),
        copies=((embedding, unembedding),)
        if config.tie_embeddings and unembedding in shapes
        else (),
    )
    source.check()
    return source


def read_json(path: FilePath) -> dict[str, Any]:
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


def _tensor_files(folder: FilePath) -> list[FilePath]:
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


def _open(path: FilePath) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        refuse_stand_in(path)
        raise InputError(
            f"{path} is truncated or corrupt ({error}); download or copy it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
