"""Weights in 8 and 4 bits as they are loaded: what is kept, what it takes, what is refused."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint, write_orbax
from models.errors import InputError
from models.formats import INT4, INT8, bytes_by_parameter, matrices
from models.quantised import QuantisedMatrix, formats_of
from tests.support import tiny_models
from tests.support.quantised_cases import PACKED, dequantised, quantised_params, random_blocks
from tests.support.tiny_gguf import write_gguf
from wavejax import DenseAttention, Generator

Encoding = gguf.GGMLQuantizationType
# Rows as long as a block of any encoding.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def tiny(**changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = tiny_models.CONFIGS["llama"] | SIZES | changes
    return config, tiny_models.make_tensors(config)


def write_packed(path: Path, encoding_of: Any, **changes: Any) -> None:
    """Write a GGUF file of random blocks; `encoding_of` gives a matrix's encoding by its name."""
    config, tensors = tiny(**changes)
    encoded = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        encoding = encoding_of(name)
        if tensor.ndim == 2 and encoding is not None:
            encoded[name] = random_blocks(encoding, tensor.shape, seed), encoding
    write_gguf(path, config, tensors, encoded=encoded)


def assert_near(given: Any, expected: Any) -> None:
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-7 * float(jnp.abs(right).max()))


def answer(config: Any, params: Any) -> list[int]:
    generator = Generator(config, DenseAttention())
    state = generator.start(params, [[3, 14, 15, 9, 26]], 8)
    return np.asarray(generator.decode_n(params, state, 8)[1])[:, 0].tolist()


@pytest.mark.parametrize("encoding", PACKED, ids=lambda encoding: encoding.name)
def test_packed_is_what_the_file_decodes_to(encoding: Any, tmp_path: Path) -> None:
    write_packed(tmp_path / "model.gguf", lambda _: encoding)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    floats, packed = (checkpoint.load_params("float32", None, kind) for kind in ("model", "packed"))
    assert {*formats_of(packed)} == {*matrices(checkpoint.config)}
    assert_near(dequantised(packed), floats)
    assert answer(checkpoint.config, packed) == answer(checkpoint.config, floats)


def test_a_stack_of_several_encodings_is_kept_in_what_they_have_in_common(tmp_path: Path) -> None:
    """As llama.cpp's Q4_K_M: some layers' values and downs are in Q6_K. Others are floats."""
    kinds = {"model.layers.0.mlp.down_proj.weight": Encoding.Q6_K}
    kinds |= {"model.layers.1.self_attn.v_proj.weight": Encoding.Q6_K, "lm_head.weight": None}
    kinds |= {"model.layers.0.self_attn.o_proj.weight": None}
    write_packed(tmp_path / "model.gguf", lambda name: kinds.get(name, Encoding.Q4_K))
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    floats, packed = (checkpoint.load_params("float32", None, kind) for kind in ("model", "packed"))
    assert_near(dequantised(packed), floats)
    formats = formats_of(packed)
    assert {path: one.bits for path, one in formats.items() if one.bits == 8} == {
        ("layers", "down"): 8,
        ("layers", "value"): 8,
    }
    assert {*matrices(checkpoint.config)} - {*formats} == {("layers", "output"), ("unembedding",)}
    # Both have small scales with factors: these are kept.
    assert formats["layers", "down"].scale == "int8"


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("file", ["folder", "gguf"])
def test_floats_are_quantised_as_they_are_read(
    file: str, weight_dtype: str, tmp_path: Path
) -> None:
    config, tensors = tiny(tie_word_embeddings=True)
    if file == "gguf":
        write_gguf(tmp_path / "model.gguf", config, tensors, Encoding.F16)
        path = tmp_path / "model.gguf"
    else:
        tiny_models.write_folder(tmp_path, config, tensors, np.float16)
        path = tmp_path
    checkpoint = open_checkpoint(path)
    for dtype in ("float32", "bfloat16"):
        given = checkpoint.load_params(dtype, None, weight_dtype)
        floats = checkpoint.load_params(dtype)
        wide = quantised_params(checkpoint.config, checkpoint.load_params("float32"), weight_dtype)
        tree = given["params"]
        assert tree["embedding"].dtype == tree["final_norm"].dtype == jnp.dtype(dtype)
        down, norm = tree["layers"]["down"], tree["layers"]["mlp_norm"]
        assert down.format == (INT8 if weight_dtype == "int8" else INT4)
        # Of the file's own numbers, not of those rounded to the dtype.
        np.testing.assert_array_equal(down.levels, wide["params"]["layers"]["down"].levels)
        np.testing.assert_array_equal(norm, floats["params"]["layers"]["mlp_norm"])
        counted = bytes_by_parameter(
            checkpoint.config, jnp.dtype(dtype).itemsize, checkpoint.formats(weight_dtype)
        )
        assert sum(counted.values()) == sum(x.nbytes for x in jax.tree.leaves(given))


def test_the_floats_of_a_model_are_never_all_in_memory(tmp_path: Path) -> None:
    config, tensors = tiny(num_hidden_layers=24)
    tiny_models.write_folder(tmp_path, config, tensors)
    checkpoint = open_checkpoint(tmp_path)
    floats = checkpoint.parameter_bytes("float32")
    peaks = []
    for weight_dtype in ("model", "int8"):
        tracemalloc.start()
        checkpoint.load_params("float32", None, weight_dtype)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > floats  # what is traced counts
    assert peaks[1] < 0.4 * floats


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    config, tensors = tiny()
    tiny_models.write_folder(tmp_path / "folder", config, tensors)
    folder = open_checkpoint(tmp_path / "folder")
    write_orbax(folder, tmp_path / "orbax", "float32")
    orbax = open_checkpoint(tmp_path / "orbax")
    assert folder.formats("model") == orbax.formats("model") == {}
    for load in (folder.formats, lambda kind: folder.load_params("float32", None, kind)):
        with pytest.raises(InputError, match=r"holds floats; .*int8'` or `weight_dtype='int4'`"):
            load("packed")
    for kind in ("int8", "int4", "packed"):
        for load in (orbax.formats, lambda kind: orbax.load_params("float32", None, kind)):
            with pytest.raises(InputError, match=r"is a converted folder, .* give the model"):
                load(kind)
    for checkpoint in (folder, orbax):
        with pytest.raises(InputError, match="is 'int3'; choose model, int8, int4 or packed"):
            checkpoint.formats("int3")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_a_number_that_is_not_finite_is_refused(
    bad: float, weight_dtype: str, tmp_path: Path
) -> None:
    config, tensors = tiny()
    tensors["model.layers.1.mlp.up_proj.weight"][200, 17] = bad
    tiny_models.write_folder(tmp_path, config, tensors)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight holds NaN or infinity"):
        open_checkpoint(tmp_path).load_params("float32", None, weight_dtype)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_numbers_past_float16_are_refused(weight_dtype: str, tmp_path: Path) -> None:
    config, tensors = tiny()
    tensors["lm_head.weight"][3, 5] = 1e5
    tiny_models.write_folder(tmp_path, config, tensors)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"lm_head.weight holds numbers too large for float16"):
        checkpoint.load_params("float16", None, weight_dtype)
    table = checkpoint.load_params("bfloat16", None, weight_dtype)["params"]["unembedding"]
    assert isinstance(table, QuantisedMatrix)
    np.testing.assert_allclose(table.dequantise()[3, 5], 1e5, rtol=0.01)


def test_a_file_that_packs_nothing_is_refused(tmp_path: Path) -> None:
    """One of floats: else it would be floats, and nobody told."""
    write_packed(tmp_path / "model.gguf", lambda _: None)
    with pytest.raises(InputError, match=r"holds no matrix that can stay in 8 or 4 bits: give"):
        open_checkpoint(tmp_path / "model.gguf").formats("packed")


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_packed(path, lambda _: Encoding.Q8_0)
    [tensor] = [x for x in gguf.GGUFReader(path).tensors if x.name == "blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight has scales that are not finite"):
        open_checkpoint(path).load_params("float32", None, "packed")
