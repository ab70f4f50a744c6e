"""Hugging Face folders of AWQ: each number, kept and dequantised."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from models.formats import WeightFormat
from models.quantised import formats_of
from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import awq
from tests.support.quantised_params import (
    LAYERS,
    assert_holds,
    assert_kept,
    assert_same_steps,
)

NAME = "model.layers.1.mlp.up_proj"


def settings(group: int = 32, **more: Any) -> dict[str, Any]:
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return said | {"version": "gemm"} | more


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("group", [32, 16, 64], ids=["32", "16", "64-and-a-part"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_levels_are_kept_and_are_the_definitions_numbers(
    group: int, dtype: Any, shards: int, tmp_path: Path
) -> None:
    expected = write_quantised(tmp_path, settings(group), awq(group, dtype), shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert_kept(checkpoint, expected, WeightFormat(4, group, "float32", minima=True))
    what = f"weights: AWQ int4 in groups of {group}"
    assert checkpoint.notes("packed") == (f"{what}, kept as the folder has them",)
    assert checkpoint.notes("model") == (
        f"{what}, dequantised to floats; `weight_dtype='packed'` keeps its levels",
    )


@pytest.mark.parametrize("weight_dtype", ["model", "packed"])
def test_all_columns_may_share_a_scale(weight_dtype: str, tmp_path: Path) -> None:
    said = settings(-1) | {"version": "GEMM"}
    expected = write_quantised(tmp_path, said, awq(None))
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint.load_params("float32", None, weight_dtype), expected)


def test_a_step_with_levels_is_that_with_floats(tmp_path: Path) -> None:
    write_quantised(tmp_path, settings(), awq(32))
    assert_same_steps(open_checkpoint(tmp_path))


def test_tied_heads_and_floats_in_between_are_read(tmp_path: Path) -> None:
    def packer(name: str) -> Any:
        return awq(32) if ".layers." in name and "layers.0.mlp.down" not in name else None

    said = settings(modules_to_not_convert=["model.layers.0.mlp.down_proj"])
    expected = write_quantised(tmp_path, said, packer, by_name=True, tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path)
    packed = checkpoint.load_params("float32", None, "packed")
    assert_holds(packed, expected)
    assert {*formats_of(packed)} == {("layers", layer) for layer in LAYERS if layer != "down"}
    [note] = checkpoint.notes("packed")
    assert note.endswith("kept as the folder has them, but for down: no product takes these")


@pytest.mark.parametrize("weight_dtype", ["packed", "int8"])
def test_the_floats_of_a_model_are_never_all_in_memory(weight_dtype: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, settings(), awq(32), num_hidden_layers=24)
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    checkpoint.load_params("float32", None, weight_dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.4 * checkpoint.parameter_bytes("float32")


def test_settings_in_a_file_of_their_own_are_asked_for(tmp_path: Path) -> None:
    write_quantised(tmp_path, None, awq(32))
    with pytest.raises(InputError, match=r"down_proj.qweight is of a quantised matrix, but config"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "last, change, said",
    [
        ("qweight", None, rf"missing {NAME}.qweight \(96, 20\) of I32"),
        ("qzeros", None, rf"missing {NAME}.qzeros \(3, 20\) of I32"),
        ("scales", None, rf"missing {NAME}.scales \(3, 160\) of F16 or BF16 or F32"),
        ("qzeros", lambda x: x[:, :9], rf"misshapen {NAME}.qzeros: .*given \(3, 9\) of I32"),
        ("qweight", lambda x: x.T, rf"misshapen {NAME}.qweight: .*given \(20, 96\) of I32"),
        (
            "scales",
            lambda x: x.astype(np.int8),
            rf"misshapen {NAME}.scales: expected \(3, 160\) of F16 .*, given \(3, 160\) of I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    last: str, change: Any, said: str, tmp_path: Path
) -> None:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        given = tensors.pop(f"{NAME}.{last}")
        if change is not None:
            tensors[f"{NAME}.{last}"] = change(given)

    write_quantised(tmp_path, settings(), awq(32), change=apply)
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"bits": 3}, "quantization_config is AWQ of 3 bits, which is not read; read are 4: take"),
        ({"bits": 8}, "quantization_config is AWQ of 8 bits, which is not read"),
        ({"version": "gemv"}, "is AWQ of the version 'gemv', which is not read; read are gemm"),
        ({"version": 2}, "is AWQ of the version 2, which is not read"),
        ({"version": None, "format": "marlin"}, "is AWQ of the version 'marlin', which is not"),
        ({"version": None, "checkpoint_format": "gemv_fast"}, "is AWQ of the version 'gemv_fast'"),
        ({"backend": "llm-awq"}, "is AWQ of the backend 'llm-awq', which is not read"),
        ({"group_size": 1.5}, "group_size is 1.5; expected a whole number"),
    ],
)
def test_settings_that_are_not_read_are_refused(more: Any, said: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, settings() | more, awq(32))
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
