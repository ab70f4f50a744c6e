"""A Hugging Face folder as a model: config.json and one or many safetensors files."""

import re
from pathlib import Path as FilePath

import numpy as np
from jaxtyping import Shaped

from models.checkpoints.hf_config import config_from_hf
from models.checkpoints.hf_matrices import QuantisedMatrices, find_quantised
from models.checkpoints.hf_quantisation import (
    quantisation_method,
    quantisation_notes,
    quantisation_settings,
)
from models.checkpoints.packed_tensors import PackedTensors
from models.checkpoints.tensor_files import TensorFiles, open_tensor_files, read_json
from models.checkpoints.tensor_source import TensorSource
from models.config import ModelConfig
from models.errors import InputError
from models.parameters import Path, Shape, parameter_shapes
from models.paths import is_file

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
_OF_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


def open_safetensors(folder: FilePath) -> TensorSource:
    """Read a Hugging Face folder's config and tensor headers and check that they agree.

    Raises:
      InputError: files missing, truncated or corrupt, an unknown architecture, a quantisation that
        is not read, or tensors that do not fit the config.
    """
    config_json = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    config = config_from_hf(config_json, read_json(generation) if is_file(generation) else None)
    settings = quantisation_settings(config_json)
    method = None if settings is None else quantisation_method(settings)
    files = open_tensor_files(folder)
    quantised: QuantisedMatrices | None = None
    shapes = dict(files.shapes)
    if method is None:
        _refuse_quantised(files)
    else:
        quantised = find_quantised(files, method, lambda name: _shape_of(config, name))
        shapes = {name: shape for name, shape in shapes.items() if name not in quantised.taken}
    files.of_floats(shapes)
    matrices = {} if quantised is None else quantised.shapes
    shapes |= matrices

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        return quantised.read(name) if quantised and name in matrices else files.read(name)

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
        packed=PackedTensors(
            quantised.formats, quantised.read_levels, quantised.said, frozenset(matrices)
        )
        if quantised and matrices
        else None,
        more_notes=quantisation_notes(settings or {}),
    )
    source.check()
    return source


def _refuse_quantised(files: TensorFiles) -> None:
    """Raise InputError if there are quantised matrices, of which config.json says nothing."""
    name = next((name for name in sorted(files.shapes) if name.endswith(_OF_QUANTISED)), None)
    if name is not None:
        raise InputError(
            f"{files.folder}: tensor {name} is of a quantised matrix, but config.json has no "
            "quantization_config; add what the folder's quantize_config.json says under that name, "
            "with its quant_method, or download the folder's own config.json"
        )


def _shape_of(config: ModelConfig, name: str) -> Shape | None:
    """Return the shape of the tensor of that name, None where the model has none."""
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= config.num_layers:
        return None
    pattern = _LAYER.sub("model.layers.{layer}.", name, count=1)
    shapes = parameter_shapes(config)
    path = next((path for path, known in _NAMES.items() if known == pattern), None)
    if path is None or path not in shapes:
        return None
    return shapes[path][1:] if path[0] == "layers" else shapes[path]
