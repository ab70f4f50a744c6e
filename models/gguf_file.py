"""A .gguf file as a model: its config, its tensors' names, and their decoding."""

import reprlib
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float, Shaped

from models.config import (
    ModelConfig,
    RopeScaling,
    scaled_context,
    unknown_architecture,
    yarn_attention_factor,
)
from models.errors import InputError
from models.gguf_header import (
    END_KINDS,
    GgufHeader,
    GgufTensor,
    named_tokens,
    read_gguf_header,
)
from models.parameters import Path
from models.tensor_source import TensorSource
from models.values import is_number

_NAMES: dict[Path, str] = {
    ("embedding",): "token_embd.weight",
    ("layers", "attention_norm"): "blk.{layer}.attn_norm.weight",
    ("layers", "query"): "blk.{layer}.attn_q.weight",
    ("layers", "key"): "blk.{layer}.attn_k.weight",
    ("layers", "value"): "blk.{layer}.attn_v.weight",
    ("layers", "query_bias"): "blk.{layer}.attn_q.bias",
    ("layers", "key_bias"): "blk.{layer}.attn_k.bias",
    ("layers", "value_bias"): "blk.{layer}.attn_v.bias",
    ("layers", "query_norm"): "blk.{layer}.attn_q_norm.weight",
    ("layers", "key_norm"): "blk.{layer}.attn_k_norm.weight",
    ("layers", "output"): "blk.{layer}.attn_output.weight",
    ("layers", "mlp_norm"): "blk.{layer}.ffn_norm.weight",
    ("layers", "gate"): "blk.{layer}.ffn_gate.weight",
    ("layers", "up"): "blk.{layer}.ffn_up.weight",
    ("layers", "down"): "blk.{layer}.ffn_down.weight",
    ("final_norm",): "output_norm.weight",
    ("unembedding",): "output.weight",
}
# llama.cpp has no "mistral": those files say llama.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_DIVISORS = "rope_freqs.weight"


def open_gguf(path: FilePath) -> TensorSource:
    """Reads a GGUF file's header and checks its tensors; their data is read by `TensorSource.load`.

    Raises:
      InputError: not a GGUF file, truncated, of an unknown architecture, or with tensors that do
        not fit the config or that the `gguf` package cannot decode.
    """
    header = read_gguf_header(path)
    config = _config(path, header)
    for name, tensor in header.tensors.items():
        _check_decodable(path, name, tensor)
    permuted = {}
    if config.architecture == "llama":
        permuted = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        tensor = read_gguf_tensor(path, header.tensors[name])
        heads = permuted.get(name.split(".", 2)[-1])
        return tensor if heads is None else half_split_rows(tensor, heads)

    source = TensorSource(
        where=str(path),
        config=config,
        names=_NAMES,
        shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        read=read,
        harmless=lambda name: name == _DIVISORS,
    )
    source.check()
    return source


def read_gguf_tensor(path: FilePath, tensor: GgufTensor) -> Float[np.ndarray, "..."]:
    """Reads and decodes one tensor: float32, or float16 where the file stores that."""
    try:
        data = np.fromfile(path, np.uint8, tensor.size, offset=tensor.offset)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if data.size != tensor.size:
        raise InputError(f"{path} became shorter while it was read")
    if tensor.kind == gguf.GGMLQuantizationType.F16:
        return data.view(np.float16).reshape(tensor.shape)
    rows = data.reshape(*tensor.shape[:-1], -1)
    if tensor.kind == gguf.GGMLQuantizationType.F32:
        rows = rows.view(np.float32)
    return gguf.quants.dequantize(rows, tensor.kind).reshape(tensor.shape)


def half_split_rows(
    matrix: Float[np.ndarray, "heads_times_dim hidden"], num_heads: int
) -> Float[np.ndarray, "heads_times_dim hidden"]:
    """Undoes llama.cpp's order of query and key rows.

    It stores each head's rows so that RoPE turns neighbours (2i, 2i + 1); the decoder turns
    (i, i + head_dim / 2).
    """
    rows, hidden = matrix.shape
    pairs = matrix.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _config(path: FilePath, header: GgufHeader) -> ModelConfig:
    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture", "unnamed")
    if architecture not in _ARCHITECTURES:
        raise InputError(f"{path}: {unknown_architecture(str(architecture))}")
    if _number(path, metadata, "split.count", 1) > 1:
        raise InputError(f"{path} is one of several parts; join them (llama-gguf-split --merge)")
    keys = _Keys(path, metadata, architecture)
    if keys.number("expert_count", 0):
        raise InputError(f"{path} is a mixture of experts, which is not supported")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise InputError(f"{path} is not a language model: it has no matrix token_embd.weight")
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{path}: keys and values of different sizes are not supported")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: RoPE on a part of each head is not supported")
    max_context = keys.integer("context_length")
    scaling = _rope_scaling(path, keys, header, max_context)
    max_context = scaled_context(max_context, scaling, str(path))
    ids = named_tokens(path, metadata)
    return ModelConfig(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"].shape[0],
        num_layers=keys.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_context=min(max_context, keys.integer("attention.sliding_window", 0) or max_context),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        stop_token_ids=tuple(dict.fromkeys(ids[kind] for kind in END_KINDS if kind in ids)),
        bos_token_id=ids.get("bos"),
    )


def _rope_scaling(
    path: FilePath, keys: "_Keys", header: GgufHeader, max_context: int
) -> RopeScaling | None:
    # As in llama.cpp, a file that states no type has linear scaling, rope.scale_linear is the
    # factor's older name, and a factor of 0 stands for none. An explicit "none" overrides both.
    kind = keys.metadata.get(f"{keys.architecture}.rope.scaling.type", "linear")
    legacy = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", legacy) or 1.0
    if kind == "linear" and factor == 1.0:
        kind = "none"
    if _DIVISORS in header.tensors:
        if kind != "none":
            raise InputError(f"{path}: {_DIVISORS} beside {kind} RoPE scaling is not supported")
        _check_decodable(path, _DIVISORS, header.tensors[_DIVISORS])
        divisors = read_gguf_tensor(path, header.tensors[_DIVISORS]).ravel()
        return RopeScaling("divisors", divisors=tuple(divisors.tolist()))
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor=factor,
            original_context=keys.integer("rope.scaling.original_context_length", max_context),
            # llama.cpp multiplies a file's attn_factor with YaRN's own.
            attention_factor=keys.number("rope.scaling.attn_factor", 1.0)
            * yarn_attention_factor(factor),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise InputError(
        f"{path}: RoPE scaling {kind!r} is not supported; supported are: none, linear, yarn"
    )


class _Keys:
    """Looks up an architecture's metadata, checking that numbers are numbers."""

    def __init__(self, path: FilePath, metadata: Mapping[str, Any], architecture: str):
        self.path, self.metadata, self.architecture = path, metadata, architecture

    def number(self, key: str, default: float | int | None = None) -> float:
        return _number(self.path, self.metadata, f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number(key, default))


def _number(
    path: FilePath, metadata: Mapping[str, Any], name: str, default: float | int | None = None
) -> float:
    value = metadata.get(name, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]  # some files repeat a number for each layer
    if value is None:
        raise InputError(f"{path}: its metadata lacks {name}")
    if not is_number(value):
        raise InputError(f"{path}: {name} is {reprlib.repr(value)}; expected one number")
    return float(value)


def _check_decodable(path: FilePath, name: str, tensor: GgufTensor) -> None:
    block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind][1]
    if tensor.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.kind)
    except NotImplementedError:
        raise InputError(
            f"{path}: tensor {name} is encoded as {tensor.kind.name}, which the gguf package "
            "cannot decode"
        ) from None
