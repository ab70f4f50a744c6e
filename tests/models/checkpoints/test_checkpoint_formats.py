"""A model gives the same parameters whichever format it comes from."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.gguf import half_split_rows, read_gguf_tensor
from models.checkpoints.gguf_header import GgufTensor
from models.checkpoints.open import find_default_model, open_checkpoint, write_orbax
from models.config import RopeScaling
from models.decoder import Decoder
from models.families import FAMILIES
from models.rope import inverse_frequencies
from tests.support import plain_attention, tiny_models
from tests.support.tiny_gguf import interleave_rows, write_gguf

Encoding = gguf.GGMLQuantizationType


def tiny(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of a tiny model, whose rows are long enough for GGUF's blocks."""
    config = tiny_models.CONFIGS[name] | {"hidden_size": 128, "intermediate_size": 160} | changes
    if config["num_attention_heads"] != 4:
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return config, tiny_models.make_tensors(config)


def load(path: Path, dtype: str = "float32") -> dict[str, Any]:
    return open_checkpoint(path).load_params(dtype)


def assert_same(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for (path, left), right in zip(
        jax.tree_util.tree_flatten_with_path(given)[0], jax.tree.leaves(expected), strict=True
    ):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_tensors_reach_their_places(name: str, tmp_path: Path) -> None:
    config, tensors = tiny(name)
    tiny_models.write_folder(tmp_path, config, tensors)
    params = load(tmp_path)["params"]
    layers = params["layers"]
    places = {
        "attention_norm": "input_layernorm.weight",
        "query": "self_attn.q_proj.weight",
        "key": "self_attn.k_proj.weight",
        "value": "self_attn.v_proj.weight",
        "query_bias": "self_attn.q_proj.bias",
        "key_bias": "self_attn.k_proj.bias",
        "value_bias": "self_attn.v_proj.bias",
        "query_norm": "self_attn.q_norm.weight",
        "key_norm": "self_attn.k_norm.weight",
        "output": "self_attn.o_proj.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    expected_bias, expected_norm = name == "qwen2", name == "qwen3"
    assert ("query_bias" in layers, "key_norm" in layers) == (expected_bias, expected_norm)
    for ours, theirs in places.items():
        for layer in range(config["num_hidden_layers"]):
            if ours in layers:
                expected = tensors.pop(f"model.layers.{layer}.{theirs}")
                np.testing.assert_array_equal(layers[ours][layer], expected)
    np.testing.assert_array_equal(params["embedding"], tensors.pop("model.embed_tokens.weight"))
    np.testing.assert_array_equal(params["final_norm"], tensors.pop("model.norm.weight"))
    if not config["tie_word_embeddings"]:
        np.testing.assert_array_equal(params["unembedding"], tensors.pop("lm_head.weight"))
    assert not tensors


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_loaded_tree_is_the_decoders(name: str, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path, *tiny(name))
    checkpoint = open_checkpoint(tmp_path)
    config, tokens = checkpoint.config, jnp.zeros((1, 3), jnp.int32)
    state = plain_attention.empty_state(config, 1, 3)
    made = jax.eval_shape(
        Decoder(config, plain_attention.attend, param_dtype=jnp.bfloat16).init,
        jax.random.key(0),
        tokens,
        tokens,
        state,
    )
    loaded = checkpoint.load_params("bfloat16")
    shape_and_dtype = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(shape_and_dtype, made) == jax.tree.map(shape_and_dtype, loaded)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(loaded)]
    assert checkpoint.parameter_bytes("bfloat16") == sum(sizes)


def test_shards_and_stored_dtypes(tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    tiny_models.write_folder(tmp_path / "one", config, tensors)
    tiny_models.write_folder(tmp_path / "three", config, tensors, shards=3)
    calls: list[tuple[int, int]] = []
    sharded = open_checkpoint(tmp_path / "three").load_params(
        "float32", lambda *call: calls.append(call)
    )
    assert_same(sharded, load(tmp_path / "one"))
    assert calls == [(done, len(tensors)) for done in range(1, len(tensors) + 1)]

    tiny_models.write_folder(tmp_path / "bf16", config, tensors, ml_dtypes.bfloat16)
    tiny_models.write_folder(tmp_path / "f16", config, tensors, np.float16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sharded)
    assert_same(load(tmp_path / "bf16", "bfloat16"), rounded)
    assert_same(load(tmp_path / "one", "bfloat16"), rounded)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert_same(load(tmp_path / "bf16", "float32"), widened)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), sharded)
    assert_same(load(tmp_path / "f16", "float16"), halved)


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    config, tensors = tiny("llama", tie_word_embeddings=True)
    tiny_models.write_folder(tmp_path / "plain", config, tensors)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    tiny_models.write_folder(tmp_path / "extra", config, tensors | extra)
    assert_same(load(tmp_path / "extra"), load(tmp_path / "plain"))


@pytest.mark.parametrize(
    "name",
    ["smollm2", *(name for name in tiny_models.FAMILIES if FAMILIES[name].gguf_architecture)],
)
def test_gguf_equals_safetensors(name: str, tmp_path: Path) -> None:
    config, tensors = tiny(name)
    tiny_models.write_folder(tmp_path / "folder", config, tensors)
    write_gguf(tmp_path / "model.gguf", config, tensors)
    from_gguf, from_folder = (
        open_checkpoint(tmp_path / "model.gguf"),
        open_checkpoint(tmp_path / "folder"),
    )
    assert from_gguf.kind == "gguf"
    # The file holds epsilon as float32.
    eps = float(np.float32(from_folder.config.norm_eps))
    assert from_gguf.config.to_json() == from_folder.config.to_json() | {"norm_eps": eps}
    assert_same(from_gguf.load_params("float32"), from_folder.load_params("float32"))


@pytest.mark.parametrize("encoding", [Encoding.F16, Encoding.BF16, Encoding.Q8_0, Encoding.Q4_0])
def test_gguf_encodings_of_a_whole_model(encoding: Encoding, tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    write_gguf(tmp_path / "model.gguf", config, tensors, encoding)

    def round_trip(tensor: np.ndarray) -> np.ndarray:
        if tensor.ndim == 1:
            return tensor
        return gguf.quants.dequantize(gguf.quants.quantize(tensor, encoding), encoding)

    rounded = {name: round_trip(tensor) for name, tensor in tensors.items()}
    tiny_models.write_folder(tmp_path / "folder", config, rounded)
    assert_same(load(tmp_path / "model.gguf"), load(tmp_path / "folder"))


def test_every_gguf_encoding_that_the_package_decodes(tmp_path: Path) -> None:
    decoded = 0
    for kind in Encoding:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.RandomState(0).randint(0, 64, (3, 2 * block_bytes)).astype(np.uint8)
        try:
            if kind not in (Encoding.F16, Encoding.F32):
                expected = gguf.quants.dequantize(data, kind)
            else:
                expected = data.view(np.float16 if kind == Encoding.F16 else np.float32)
        except NotImplementedError:
            continue
        (tmp_path / "data").write_bytes(b"x" * 7 + data.tobytes())
        tensor = GgufTensor((3, 2 * block), kind, 7, data.nbytes)
        np.testing.assert_array_equal(read_gguf_tensor(tmp_path / "data", tensor), expected)
        decoded += 1
    assert decoded >= 20


def test_llama_rows_round_trip() -> None:
    matrix = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    stored = interleave_rows(matrix, 3)
    assert not np.array_equal(stored, matrix)
    np.testing.assert_array_equal(half_split_rows(stored, 3), matrix)


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    config, tensors = tiny("llama31")
    tiny_models.write_folder(tmp_path / "llama31", config, tensors)
    expected = open_checkpoint(tmp_path / "llama31").config
    plain = inverse_frequencies(open_folder_without_scaling(tmp_path, config, tensors))
    divisors = plain / inverse_frequencies(expected)
    assert divisors.min() == 1 < divisors.max()
    extra = {"rope_freqs.weight": divisors.astype(np.float32)}
    write_gguf(tmp_path / "llama31.gguf", config, tensors, extra_tensors=extra)
    given = open_checkpoint(tmp_path / "llama31.gguf").config
    np.testing.assert_allclose(inverse_frequencies(given), inverse_frequencies(expected), 1e-6)

    config, tensors = tiny("qwen2_yarn")
    scaling = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
        "qwen2.rope.scaling.yarn_beta_fast": 8.0,
    }
    tiny_models.write_folder(tmp_path / "yarn", config, tensors)
    write_gguf(tmp_path / "yarn.gguf", config, tensors, metadata=scaling)
    given, expected = (open_checkpoint(tmp_path / name).config for name in ("yarn.gguf", "yarn"))
    assert given.rope_scaling == expected.rope_scaling
    assert given.max_context == expected.max_context == 256


@pytest.mark.parametrize(
    "said, factor",
    [
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling.factor": 0.0}, None),
        ({"scaling.factor": 1.0}, None),
        ({"scale_linear": 1.0}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "none", "scale_linear": 4.0}, None),
    ],
)
def test_gguf_rope_scaling_without_type(
    said: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    metadata = {f"llama.rope.{key}": value for key, value in said.items()}
    write_gguf(tmp_path / "model.gguf", *tiny("llama"), metadata=metadata)
    expected = None if factor is None else RopeScaling("linear", factor=factor)
    assert open_checkpoint(tmp_path / "model.gguf").config.rope_scaling == expected


def open_folder_without_scaling(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Any:
    tiny_models.write_folder(tmp_path / "plain", config | {"rope_scaling": None}, tensors)
    return open_checkpoint(tmp_path / "plain").config


@pytest.mark.parametrize("name", ["qwen2_yarn", "qwen3"])
def test_orbax_round_trip(name: str, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "folder", *tiny(name))
    original = open_checkpoint(tmp_path / "folder")
    write_orbax(
        original,
        tmp_path / "orbax",
        "bfloat16",
        add_files=lambda folder: (folder / "note").touch(),
    )
    assert (tmp_path / "orbax" / "note").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "orbax"]
    copy = open_checkpoint(tmp_path / "orbax")
    assert (copy.kind, copy.config) == ("orbax", original.config)
    rounded = original.load_params("bfloat16")
    assert_same(copy.load_params("bfloat16"), rounded)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert_same(copy.load_params("float32"), widened)
    again = tmp_path / "again"
    write_orbax(copy, again, "bfloat16")
    assert_same(load(again, "bfloat16"), rounded)


def test_default_model_is_found() -> None:
    config = open_checkpoint(find_default_model()).config
    sizes = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads)
    assert sizes == (30, 576, 9, 3)
    assert (config.head_dim, config.rope_theta, config.max_context) == (64, 1e5, 8192)
    assert config.tie_embeddings
