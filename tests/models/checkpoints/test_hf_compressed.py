"""Hugging Face folders of compressed-tensors: each number, kept and dequantised."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.formats import INT8, WeightFormat
from models.quantised import formats_of
from tests.support.compressed_settings import ints, settings
from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import compressed, fp8
from tests.support.quantised_params import (
    assert_holds,
    assert_kept,
    assert_same_steps,
)

PLAIN = "int-quantized"
HALF = np.float16
# The settings, the packer, and the format that the matrices are kept in.
KEPT: dict[str, tuple[Any, Any, Any]] = {
    "int4-groups": (ints(4, 32), compressed(4, group=32), WeightFormat(4, 32, "bfloat16")),
    "int4-half": (ints(4, 16), compressed(4, group=16, dtype=HALF), WeightFormat(4, 16, "float16")),
    # 96 and 160 columns: the last group is smaller.
    "int4-parts-of-groups": (ints(4, 64), compressed(4, group=64), WeightFormat(4, 64, "bfloat16")),
    "int4-zero-points": (
        ints(4, 32, symmetric=False),
        compressed(4, group=32, symmetric=False),
        WeightFormat(4, 32, "float32", minima=True),
    ),
    "int4-plain-zero-points": (
        ints(4, 32, symmetric=False),
        compressed(4, group=32, symmetric=False, plain_zero_points=True),
        WeightFormat(4, 32, "float32", minima=True),
    ),
    "int8-packed-groups": (ints(8, 32), compressed(8, group=32), WeightFormat(8, 32, "bfloat16")),
    "int8-packed-zero-points": (
        ints(8, 48, symmetric=False),
        compressed(8, group=48, symmetric=False),
        WeightFormat(8, 48, "float32", minima=True),
    ),
    "int8-packed-channel": (ints(8, "channel"), compressed(8, group="channel"), INT8),
    "int8-channel": (
        ints(8, "channel", format=PLAIN),
        compressed(8, group="channel", packed=False),
        INT8,
    ),
    "int8-channel-zero-points": (
        ints(8, "channel", symmetric=False, format=PLAIN),
        compressed(8, group="channel", packed=False, symmetric=False),
        WeightFormat(8, None, "float32", minima=True),
    ),
    "int8-matrix": (
        ints(8, "tensor", format="naive-quantized"),
        compressed(8, group="tensor", packed=False, dtype=np.float32),
        INT8,
    ),
    "int8-matrix-zero-point": (
        ints(8, "tensor", symmetric=False, format=PLAIN),
        compressed(8, group="tensor", packed=False, symmetric=False),
        WeightFormat(8, None, "float32", minima=True),
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_levels_are_kept_and_are_the_definitions_numbers(name: str, tmp_path: Path) -> None:
    said, packer, format = KEPT[name]
    expected = write_quantised(tmp_path, said, packer)
    assert_kept(open_checkpoint(tmp_path), expected, format)


def test_float32_scales_with_zero_points_are_kept_to_their_rounding(tmp_path: Path) -> None:
    packer = compressed(4, group=32, symmetric=False, dtype=np.float32)
    expected = write_quantised(tmp_path, ints(4, 32, symmetric=False), packer)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint.load_params("float32"), expected)
    packed = checkpoint.load_params("float32", None, "packed")
    assert_holds(packed, expected, atol=6e-8)


@pytest.mark.parametrize("name", ["int4-zero-points", "int4-parts-of-groups", "int8-channel"])
def test_a_step_with_levels_is_that_with_floats(name: str, tmp_path: Path) -> None:
    said, packer, _ = KEPT[name]
    write_quantised(tmp_path, said, packer, shards=2)
    assert_same_steps(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "said, packer, what",
    [
        pytest.param(
            settings("float-quantized", num_bits=8, type="float", strategy="channel"),
            fp8(lambda shape: (shape[0], 1), name="weight_scale", dtype=ml_dtypes.bfloat16),
            "compressed-tensors fp8 with a scale a channel",
            id="fp8-channel",
        ),
        pytest.param(
            settings("naive-quantized", num_bits=8, type="float", strategy="tensor"),
            fp8(lambda _: (1,), name="weight_scale"),
            "compressed-tensors fp8 with one scale",
            id="fp8-matrix",
        ),
        pytest.param(
            settings(
                "float-quantized",
                num_bits=8,
                type="float",
                strategy="block",
                block_structure=[40, 48],
            ),
            fp8(lambda shape: (-(-shape[0] // 40), -(-shape[1] // 48)), (40, 48), "weight_scale"),
            "compressed-tensors fp8 in blocks of 40 by 48",
            id="fp8-blocks",
        ),
        pytest.param(
            ints(4, 32),
            compressed(4, group=32, order=True),
            "compressed-tensors int4 in groups of 32",
            id="columns-in-any-order",
        ),
        pytest.param(
            ints(4, 5), compressed(4, group=5), "compressed-tensors int4 in groups of 5", id="odd"
        ),
    ],
)
def test_what_no_product_takes_is_floats(said: Any, packer: Any, what: str, tmp_path: Path) -> None:
    expected = write_quantised(tmp_path, said, packer)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.formats("packed") == {}
    for weight_dtype in ("model", "packed"):
        assert_holds(checkpoint.load_params("float32", None, weight_dtype), expected)
    done = "dequantised to floats: no product takes them as they are"
    assert checkpoint.notes("packed") == (f"weights: {what}, {done}",)


def test_groups_of_minus_one_are_in_order(tmp_path: Path) -> None:
    def unset(tensors: dict[str, np.ndarray]) -> None:
        for name in [*tensors]:
            if name.endswith("weight_shape"):
                columns = int(tensors[name][1])
                module = name.removesuffix("weight_shape")
                tensors[f"{module}weight_g_idx"] = np.full(columns, -1, np.int32)

    expected = write_quantised(tmp_path, ints(4, 32), compressed(4, group=32), change=unset)
    assert_holds(open_checkpoint(tmp_path).load_params("float32"), expected)


def test_each_matrix_has_the_layout_of_its_group(tmp_path: Path) -> None:
    """A name goes before a pattern, and a pattern before a class."""
    said = ints(4, 32) | {"format": "mixed-precision"}
    down = "model.layers.1.mlp.down_proj"
    others = {
        "group_1": {"targets": [r"re:.*mlp\.(down|up)_proj$"], "format": "pack-quantized"}
        | {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}},
        "group_2": {"targets": [down], "format": "float-quantized"}
        | {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
    }
    said["config_groups"]["group_0"]["format"] = "pack-quantized"
    said["config_groups"] |= others

    def packer(name: str) -> Any:
        if name == f"{down}.weight":
            return fp8(lambda _: (1,), name="weight_scale")
        if "mlp.down" in name or "mlp.up" in name:
            return compressed(8, group=16)
        return compressed(4, group=32) if ".layers." in name else None

    expected = write_quantised(tmp_path, said, packer, by_name=True)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint.load_params("float32"), expected)
    packed = checkpoint.load_params("float32", None, "packed")
    assert_holds(packed, expected)
    formats = formats_of(packed)
    assert (formats["layers", "up"].bits, formats["layers", "gate"].bits) == (8, 4)
    assert ("layers", "down") not in formats
    [note] = checkpoint.notes("packed")
    assert note.endswith("kept as the folder has them, but for down: no product takes these")


def test_layers_of_two_groups_are_kept_in_what_they_have_in_common(tmp_path: Path) -> None:
    said = ints(4, 32, symmetric=False)
    said["config_groups"]["group_1"] = {
        "targets": ["re:model.layers.0"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16},
    }

    def packer(name: str) -> Any:
        if ".layers." not in name:
            return None
        first = "layers.0" in name
        return compressed(8, group=16) if first else compressed(4, group=32, symmetric=False)

    expected = write_quantised(tmp_path, said, packer, by_name=True)
    packed = open_checkpoint(tmp_path).load_params("float32", None, "packed")
    assert_holds(packed, expected)
    assert {*formats_of(packed).values()} == {WeightFormat(8, 16, "float32", minima=True)}


def test_a_channel_and_groups_are_no_stack(tmp_path: Path) -> None:
    said = ints(8, "channel", format=PLAIN)
    said["config_groups"]["group_1"] = {
        "targets": ["re:model.layers.0"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16},
    }

    def packer(name: str) -> Any:
        if ".layers." not in name:
            return None
        return compressed(8, group=16 if "layers.0" in name else "channel", packed=False)

    expected = write_quantised(tmp_path, said, packer, by_name=True)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.formats("packed") == {}
    assert_holds(checkpoint.load_params("float32", None, "packed"), expected)
