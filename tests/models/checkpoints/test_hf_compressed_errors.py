"""Hugging Face folders of compressed-tensors that do not fit, or that are not read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from models.quantised import formats_of
from tests.support.compressed_settings import ints, settings
from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import compressed
from tests.support.quantised_params import assert_holds

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda tensors: tensors.pop(f"{NAME}.weight_scale"),
            rf"missing {NAME}.weight_scale \(160, 3\) of F16 or BF16 or F32",
        ),
        (
            lambda tensors: tensors.pop(f"{NAME}.weight_packed"),
            rf"missing {NAME}.weight_packed \(160, 12\) of I32",
        ),
        (
            lambda tensors: tensors.pop(f"{NAME}.weight_shape"),
            rf"missing {NAME}.weight_shape \(2,\) of I32 or I64",
        ),
        (
            lambda tensors: tensors.pop(f"{NAME}.weight_zero_point"),
            rf"missing {NAME}.weight_zero_point \(20, 3\) of I32",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_scale": np.ones((160, 2), "f4")}),
            rf"misshapen {NAME}.weight_scale: expected \(160, 3\) of .*, given \(160, 2\) of F32",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_packed": np.ones((160, 12), "i8")}),
            rf"misshapen {NAME}.weight_packed: expected .* of I32, given \(160, 12\) of I64",
        ),
        (
            lambda tensors: tensors.update({"model.layers.9.a.weight_packed": np.ones(3, "i4")}),
            r"tensor model.layers.9.a.weight_packed is stored as I32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, said: str, tmp_path: Path) -> None:
    packer = compressed(4, group=32, symmetric=False)
    write_quantised(tmp_path, ints(4, 32, symmetric=False), packer, change=change)
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def changed(last: str, change: Any) -> Any:
    """Change one tensor."""

    def of(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{NAME}.{last}"] = change(tensors.get(f"{NAME}.{last}"))

    return of


@pytest.mark.parametrize(
    "change, said",
    [
        (changed("weight_shape", lambda given: given + 1), r"its weight_shape says \(161, 97\)"),
        (
            changed("weight_g_idx", lambda _: np.full(96, 3, np.int32)),
            "has a weight_g_idx from 3 to 3, but 3 groups",
        ),
        (
            changed("weight_zero_point", lambda _: np.ones((160, 3), np.int8)),
            "has zero points, but config.json says symmetric",
        ),
    ],
)
def test_numbers_that_contradict_the_config_are_refused(
    change: Any, said: str, tmp_path: Path
) -> None:
    write_quantised(tmp_path, ints(4, 32), compressed(4, group=32), change=change)
    with pytest.raises(InputError, match=f"{NAME}.weight .*{said}") as error:
        open_checkpoint(tmp_path).load_params("float32")
    assert "\n" not in str(error.value)


def test_zero_points_of_zero_are_symmetric(tmp_path: Path) -> None:
    change = changed("weight_zero_point", lambda _: np.zeros((160, 3), np.int8))
    expected = write_quantised(tmp_path, ints(4, 32), compressed(4, group=32), change=change)
    packed = open_checkpoint(tmp_path).load_params("float32", None, "packed")
    assert_holds(packed, expected)
    assert not formats_of(packed)["layers", "up"].minima


@pytest.mark.parametrize(
    "said, why",
    [
        (ints(3, 32), r"group_0 has weights of type 'int' and 3 bits, which are not read; read"),
        (settings(num_bits=4, type="float", strategy="tensor"), "type 'float' and 4 bits, which"),
        (settings(num_bits=8, type="float", strategy="tensor"), "float of 8 that are not packed"),
        (
            ints(4, 32, format="marlin-24"),
            "has the format 'marlin-24', which is not read; read are",
        ),
        (ints(4, 32, format="nvfp4-pack-quantized"), "has the format 'nvfp4-pack-quantized'"),
        (ints(4, "token"), "has the strategy 'token', which is not read"),
        (ints(4, 0), "has the group_size 0; expected a whole number from 1 on"),
        (ints(4, 32) | {"config_groups": {}}, r"config_groups are \{\}; expected groups"),
        (
            ints(4, 32) | {"config_groups": {"W4A16": ["Linear"]}},
            r"W4A16 is \['Linear'\]; expected",
        ),
        (ints(4, 32) | {"transform_config": {"a": 1}}, "has a transform_config, which is not read"),
        (
            ints(4, 32) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "has a sparsity_config of the format 'sparse-24-bitmask', which is not read",
        ),
        (
            ints(4, 32) | {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}},
            "a quantises no weights but activations",
        ),
        (
            ints(4, 32)
            | {"config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 8}}}},
            "a has the target 're:\\('",
        ),
        (
            ints(4, 32)
            | {"config_groups": {"a": {"targets": ["re:.*down"], "weights": {"num_bits": 8}}}},
            "has no group whose targets name model.layers.0.mlp.gate_proj",
        ),
        (
            settings("float-quantized", num_bits=8, type="float", strategy="block"),
            "block_structure is None; expected two whole numbers",
        ),
        (
            settings("float-quantized", num_bits=8, type="float", group_size=32),
            "has floats in groups, which are not read",
        ),
        (
            settings("float-quantized", num_bits=8, type="float", symmetric=False),
            "has zero points of floats or blocks",
        ),
    ],
)
def test_settings_that_are_not_read_are_refused(said: Any, why: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, said, compressed(4, group=32))
    with pytest.raises(InputError, match=why) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_may_ask_for_a_quantised_cache_alone(tmp_path: Path) -> None:
    said = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"a": 1}}
    expected = write_quantised(tmp_path, said, lambda _: None, by_name=True)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint.load_params("float32"), expected)
    [note] = checkpoint.notes("model")
    assert "kv_cache_scheme" in note
    with pytest.raises(InputError, match="holds floats"):
        checkpoint.formats("packed")


def test_a_folder_sorted_by_activations_says_its_groups(tmp_path: Path) -> None:
    write_quantised(tmp_path, ints(4, 32, actorder="group"), compressed(4, group=32))
    with pytest.raises(InputError, match=rf"missing {NAME}.weight_g_idx \(96,\) of I32 or I64"):
        open_checkpoint(tmp_path)


def test_groups_that_are_all_the_first_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{NAME}.weight_g_idx"] = np.zeros(96, "i4")

    write_quantised(tmp_path, ints(4, 32), compressed(4, group=32), change=change)
    with pytest.raises(InputError, match="has 3 groups, and weight_g_idx names the first alone"):
        open_checkpoint(tmp_path).load_params("float32")


def test_groups_of_activations_alone_are_of_no_matter(tmp_path: Path) -> None:
    said = ints(4, 32)
    said["config_groups"]["of attention"] = {"targets": ["LlamaAttention"], "weights": None}
    expected = write_quantised(tmp_path, said, compressed(4, group=32))
    assert_holds(open_checkpoint(tmp_path).load_params("float32"), expected)
