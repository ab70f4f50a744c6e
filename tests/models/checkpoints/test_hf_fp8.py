"""Hugging Face folders of fp8: floats of 8 bits, with scales of blocks, rows or matrices."""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from models.formats import INT4, bytes_by_parameter
from models.quantised import formats_of
from tests.support.quantised_cases import quantised_params
from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import fp8
from tests.support.quantised_params import assert_holds

BLOCKS = {"quant_method": "fp8", "weight_block_size": [40, 48], "activation_scheme": "dynamic"}


def blocks(rows: int, columns: int, dtype: Any = np.float32) -> Any:
    def shape(matrix: tuple[int, int]) -> tuple[int, ...]:
        return math.ceil(matrix[0] / rows), math.ceil(matrix[1] / columns)

    return fp8(shape, (rows, columns), dtype=dtype)


@pytest.mark.parametrize(
    "settings, packer",
    [
        pytest.param(BLOCKS, blocks(40, 48), id="blocks"),
        pytest.param(BLOCKS, blocks(40, 48, ml_dtypes.bfloat16), id="bfloat16-scales"),
        pytest.param({"quant_method": "fp8"}, blocks(128, 128), id="usual-blocks"),
        pytest.param(
            {"quant_method": "fp8", "weight_block_size": None},
            fp8(lambda _: ()),
            id="a-scale-a-matrix",
        ),
        pytest.param(
            {"quant_method": "fp8", "activation_scheme": "static"},
            fp8(lambda _: (1,), name="weight_scale"),
            id="weight_scale",
        ),
        pytest.param(
            {"quant_method": "fp8", "weight_block_size": None},
            fp8(lambda shape: (shape[0], 1), name="weight_scale", dtype=np.float16),
            id="a-scale-a-channel",
        ),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_the_numbers_are_floats_times_scales(
    settings: Any, packer: Any, shards: int, tmp_path: Path
) -> None:
    expected = write_quantised(tmp_path, settings, packer, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    for weight_dtype in ("model", "packed"):
        assert checkpoint.formats(weight_dtype) == {}
        assert_holds(checkpoint.load_params("float32", None, weight_dtype), expected)


def test_floats_are_quantised_again_as_they_are_read(tmp_path: Path) -> None:
    write_quantised(tmp_path, BLOCKS, blocks(40, 48))
    checkpoint = open_checkpoint(tmp_path)
    given = checkpoint.load_params("float32", None, "int4")
    wide = quantised_params(checkpoint.config, checkpoint.load_params("float32"), "int4")
    for name in ("query", "down"):
        ours, theirs = given["params"]["layers"][name], wide["params"]["layers"][name]
        assert ours.format == INT4
        np.testing.assert_array_equal(ours.levels, theirs.levels)
    counted = bytes_by_parameter(checkpoint.config, 4, checkpoint.formats("int4"))
    assert {*formats_of(given)} == {*checkpoint.formats("int4")}
    assert counted["layers", "down"] == given["params"]["layers"]["down"].nbytes


def test_some_matrices_may_be_floats(tmp_path: Path) -> None:
    """As modules_to_not_convert says: each tensor's own dtype counts."""
    settings = BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"]}
    expected = write_quantised(
        tmp_path,
        settings,
        lambda name: None if "lm_head" in name or "0.mlp.down" in name else blocks(40, 48),
        by_name=True,
    )
    assert_holds(open_checkpoint(tmp_path).load_params("float32"), expected)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        module = "model.layers.1.self_attn"
        tensors[f"{module}.q_proj.activation_scale"] = np.float32(3).reshape(())
        tensors[f"{module}.k_proj.input_scale"] = np.float32(3).reshape(1)
        tensors[f"{module}.k_scale"] = np.float32(3).reshape(1)

    expected = write_quantised(tmp_path, BLOCKS, blocks(40, 48), change=add)
    assert_holds(open_checkpoint(tmp_path).load_params("float32"), expected)


def test_notes_say_what_comes_of_it(tmp_path: Path) -> None:
    write_quantised(tmp_path, BLOCKS, blocks(40, 48))
    notes = open_checkpoint(tmp_path).notes
    what = "weights: fp8 in blocks of 40 by 48, dequantised"
    assert notes("model") == (f"{what} to floats",)
    assert notes("packed") == (f"{what} to floats: no product takes them as they are",)
    assert notes("int8") == (f"{what}, then rounded to int8",)


NAME = "model.layers.1.mlp.up_proj"


def renamed(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop(f"{NAME}.weight")


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda tensors: tensors.pop(f"{NAME}.weight_scale_inv"),
            rf"1 of its tensors do not fit .*: missing {NAME}.weight_scale_inv \(4, 2\) of F16 or",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_scale_inv": np.ones((2, 2), "f4")}),
            rf"misshapen {NAME}.weight_scale_inv: expected \(4, 2\) of .*, given \(2, 2\) of F32",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight": np.ones((160, 96), "f4")}),
            rf"misshapen {NAME}.weight: expected \(160, 96\) of F8_E4M3 or .*, given .* of F32",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight": np.ones((160, 96), "i1")}),
            rf"misshapen {NAME}.weight: expected \(160, 96\) of F8_E4M3 or .*, given .* of I8",
        ),
        (
            lambda tensors: tensors.pop(f"{NAME}.weight"),
            rf"missing {NAME}.weight \(160, 96\) of F8_E4M3",
        ),
    ],
    ids=["no-scales", "misshapen-scales", "floats", "integers", "no-weight"],
)
def test_what_does_not_fit_is_named(change: Any, said: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, BLOCKS, blocks(40, 48), change=change)
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tensor_of_no_parameter_is_named(tmp_path: Path) -> None:
    write_quantised(tmp_path, BLOCKS, blocks(40, 48), change=renamed)
    with pytest.raises(InputError, match=r"missing .*1.mlp.up_proj.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method is 'bitsandbytes', which is not read; "),
        ({"bits": 4}, r"quant_method is None, which is not read; read are: fp8"),
        ([8], r"quantization_config is \[8\]; expected an object"),
        (BLOCKS | {"weight_block_size": [128]}, r"weight_block_size is \[128\]; expected two"),
        (BLOCKS | {"weight_block_size": [0, 8]}, r"weight_block_size is \[0, 8\]; expected two"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings: Any, said: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, settings, blocks(40, 48))
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_quantised_cache_is_a_note(tmp_path: Path) -> None:
    settings = BLOCKS | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    write_quantised(tmp_path, settings, blocks(40, 48))
    notes = open_checkpoint(tmp_path).notes("model")
    assert len(notes) == 2
    assert "kv_cache_scheme" in notes[1]
    assert "`row_dtype='int8'`" in notes[1]
