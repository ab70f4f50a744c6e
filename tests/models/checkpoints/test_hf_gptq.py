"""Hugging Face folders of GPTQ: each number, kept and dequantised."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from models.checkpoints.open import open_checkpoint
from models.errors import InputError
from models.formats import INT8, WeightFormat
from models.quantised import formats_of
from tests.support.quantised_cases import dequantised
from tests.support.quantised_folders import write_quantised
from tests.support.quantised_packers import gptq
from tests.support.quantised_params import (
    LAYERS,
    assert_holds,
    assert_kept,
    assert_same_steps,
)

NAME = "model.layers.1.mlp.up_proj"


def settings(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False} | more


# The settings, the packer, and the format that the matrices are kept in.
KEPT: dict[str, tuple[Any, Any, Any]] = {
    "int4": (settings(), gptq(4, group=32), WeightFormat(4, 32, "float32", minima=True)),
    "int4-second-format": (
        settings(checkpoint_format="gptq_v2", desc_act=False),
        gptq(4, group=32, less_one=False),
        WeightFormat(4, 32, "float32", minima=True),
    ),
    "int4-symmetric": (
        settings(sym=True),
        gptq(4, group=32, symmetric=True),
        WeightFormat(4, 32, "float16"),
    ),
    "int4-bfloat16-no-g_idx": (
        settings(sym=True, format="gptq_v2"),
        gptq(
            4,
            group=32,
            symmetric=True,
            less_one=False,
            dtype=ml_dtypes.bfloat16,
            with_groups=False,
        ),
        WeightFormat(4, 32, "bfloat16"),
    ),
    # 96 and 160 columns: the last group is smaller.
    "int4-parts-of-groups": (
        settings(group=64),
        gptq(4, group=64),
        WeightFormat(4, 64, "float32", minima=True),
    ),
    "int8": (settings(8), gptq(8, group=32), WeightFormat(8, 32, "float32", minima=True)),
    "int8-symmetric": (
        settings(8, 16, sym=True),
        gptq(8, group=16, symmetric=True),
        WeightFormat(8, 16, "float16"),
    ),
    "int8-channel": (settings(8, -1, sym=True), gptq(8, group=None, symmetric=True), INT8),
}


@pytest.mark.parametrize("name", KEPT)
def test_levels_are_kept_and_are_the_definitions_numbers(name: str, tmp_path: Path) -> None:
    said, packer, format = KEPT[name]
    expected = write_quantised(tmp_path, said, packer)
    checkpoint = open_checkpoint(tmp_path)
    assert_kept(checkpoint, expected, format)
    sizes = "with a scale a channel" if said["group_size"] == -1 else f"groups of {format.group}"
    [note] = checkpoint.notes("packed")
    assert note.startswith(f"weights: GPTQ int{said['bits']} ")
    assert note.endswith(f"{sizes}, kept as the folder has them")


def test_all_columns_may_share_a_scale_in_4_bits(tmp_path: Path) -> None:
    expected = write_quantised(tmp_path, settings(group=-1), gptq(4, group=None))
    packed = open_checkpoint(tmp_path).load_params("float32", None, "packed")
    assert_holds(packed, expected)
    formats = formats_of(packed)
    assert formats["layers", "up"] == WeightFormat(4, 96, "float32", minima=True)
    assert formats["layers", "down"] == WeightFormat(4, 160, "float32", minima=True)


def test_a_group_may_be_larger_than_a_row(tmp_path: Path) -> None:
    said = settings(8, 128, sym=True)
    expected = write_quantised(tmp_path, said, gptq(8, group=128, symmetric=True))
    packed = open_checkpoint(tmp_path).load_params("float32", None, "packed")
    assert_holds(packed, expected)
    formats = formats_of(packed)
    assert formats["layers", "up"] == INT8  # of 96 columns
    assert formats["layers", "down"] == WeightFormat(8, 128, "float16")


@pytest.mark.parametrize("name", ["int4", "int4-symmetric", "int8-channel"])
def test_a_step_with_levels_is_that_with_floats(name: str, tmp_path: Path) -> None:
    said, packer, _ = KEPT[name]
    write_quantised(tmp_path, said, packer, shards=2)
    assert_same_steps(open_checkpoint(tmp_path))


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_is_floats(bits: int, tmp_path: Path) -> None:
    expected = write_quantised(
        tmp_path, settings(bits, desc_act=True), gptq(bits, group=32, order=True)
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.formats("packed") == {}
    for weight_dtype in ("model", "packed"):
        assert_holds(checkpoint.load_params("float32", None, weight_dtype), expected)
    [note] = checkpoint.notes("packed")
    assert note == (
        f"weights: GPTQ int{bits} in groups of 32 by act-order, dequantised to floats: no product "
        "takes them as they are"
    )


def test_a_head_and_other_matrices_are_what_their_tensors_say(tmp_path: Path) -> None:
    def packer(name: str) -> Any:
        floats = "embed" in name or "layers.1.mlp.gate" in name
        return None if floats else gptq(4, group=32)

    said = settings(lm_head=True, dynamic={"-:.*gate.*": {}})
    expected = write_quantised(tmp_path, said, packer, by_name=True)
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint.load_params("float32"), expected)
    packed = checkpoint.load_params("float32", None, "packed")
    assert_holds(packed, expected)
    kept = {("layers", layer) for layer in LAYERS if layer != "gate"} | {("unembedding",)}
    assert {*formats_of(packed)} == kept
    [note] = checkpoint.notes("packed")
    assert note.endswith("kept as the folder has them, but for gate: no product takes these")


def test_biases_of_zeros_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    def add(value: float) -> Any:
        def change(tensors: dict[str, np.ndarray]) -> None:
            tensors[f"{NAME}.bias"] = np.full(160, value, np.float16)

        return change

    expected = write_quantised(tmp_path / "zeros", settings(), gptq(4, group=32), change=add(0))
    assert_holds(open_checkpoint(tmp_path / "zeros").load_params("float32"), expected)
    write_quantised(tmp_path / "ones", settings(), gptq(4, group=32), change=add(1))
    with pytest.raises(InputError, match=f"extra {NAME}.bias"):
        open_checkpoint(tmp_path / "ones")


def test_the_biases_of_a_model_are_read(tmp_path: Path) -> None:
    more = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    expected = write_quantised(tmp_path, settings(), gptq(4, group=32), **more)
    params = open_checkpoint(tmp_path).load_params("float32")["params"]
    bias = expected["model.layers.1.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(params["layers"]["query_bias"][1], bias)


@pytest.mark.parametrize(
    "last, change, said",
    [
        ("qweight", None, rf"missing {NAME}.qweight \(12, 160\) of I32"),
        ("qzeros", None, rf"missing {NAME}.qzeros \(3, 20\) of I32"),
        ("scales", None, rf"missing {NAME}.scales \(3, 160\) of F16 or BF16 or F32"),
        ("scales", lambda x: x[:2], rf"misshapen {NAME}.scales: .*given \(2, 160\) of F16"),
        ("qweight", lambda x: x[:, :9], rf"misshapen {NAME}.qweight: .*given \(12, 9\) of I32"),
        ("g_idx", lambda x: x[:-1], rf"misshapen {NAME}.g_idx: expected \(96,\) of I32 or I64"),
        ("g_idx", None, rf"missing {NAME}.g_idx \(96,\) of I32 or I64"),
        ("g_idx", lambda x: x + 1, rf"{NAME}.weight has a g_idx from 1 to 3, but 3 groups"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    last: str, change: Any, said: str, tmp_path: Path
) -> None:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        given = tensors.pop(f"{NAME}.{last}")
        if change is not None:
            tensors[f"{NAME}.{last}"] = change(given)

    write_quantised(tmp_path, settings(desc_act=True), gptq(4, group=32), change=apply)
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path).load_params("float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more, packer, said",
    [
        ({"sym": True}, gptq(4, group=32), "has zero points other than 8, but config.json says"),
        (
            {},
            gptq(4, group=32, order=True),
            r"has groups in another order than .* \(g_idx\)",
        ),
    ],
)
def test_levels_that_contradict_the_config_are_refused_and_read_as_floats(
    more: Any, packer: Any, said: str, tmp_path: Path
) -> None:
    expected = write_quantised(tmp_path, settings(**more), packer)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=f"proj.weight {said}.*give `weight_dtype='model'`"):
        checkpoint.load_params("float32", None, "packed")
    assert_holds(checkpoint.load_params("float32"), expected)


@pytest.mark.parametrize("weight_dtype", ["model", "int8", "packed"])
@pytest.mark.parametrize("less_one, said", [(True, "gptq_v2"), (False, "gptq")])
def test_zero_points_of_the_other_format_are_refused(
    less_one: bool, said: str, weight_dtype: str, tmp_path: Path
) -> None:
    packer = gptq(4, group=32, symmetric=True, less_one=less_one)
    write_quantised(tmp_path, settings(sym=True, checkpoint_format=said), packer)
    other = "gptq" if less_one else "gptq_v2"
    with pytest.raises(InputError, match=f"set checkpoint_format to '{other}'"):
        open_checkpoint(tmp_path).load_params("float32", None, weight_dtype)


@pytest.mark.parametrize("weight_dtype", ["model", "packed"])
@pytest.mark.parametrize("act_order", [True, False])
def test_a_g_idx_of_zeros_says_nothing(act_order: bool, weight_dtype: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name] = np.zeros_like(tensors[name])

    packer = gptq(4, group=32)
    expected = write_quantised(tmp_path, settings(desc_act=act_order), packer, change=change)
    found = open_checkpoint(tmp_path).load_params("float32", None, weight_dtype)
    assert_holds(dequantised(found), expected)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{NAME}.scales"][1, 5] = np.inf

    write_quantised(tmp_path, settings(), gptq(4, group=32), change=change)
    checkpoint = open_checkpoint(tmp_path)
    for weight_dtype, said in (
        ("packed", "has scales that are not finite"),
        ("int8", "holds NaN or infinity"),
    ):
        with pytest.raises(InputError, match=f"{NAME}.weight {said}"):
            checkpoint.load_params("float32", None, weight_dtype)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"bits": 3}, "quantization_config is GPTQ of 3 bits, which is not read; read are 4 and 8"),
        ({"bits": 2}, "quantization_config is GPTQ of 2 bits, which is not read"),
        ({"bits": None}, "quantization_config is GPTQ of None bits, which is not read"),
        ({"bits": [4]}, r"quantization_config is GPTQ of \[4\] bits, which is not read"),
        ({"group_size": 0}, "group_size is 0; expected a whole number from 1 on, or -1"),
        ({"group_size": "32"}, "group_size is '32'; expected a whole number"),
        ({"checkpoint_format": "marlin"}, "is GPTQ in the format 'marlin', which is not read"),
        ({"is_marlin_format": True}, "is GPTQ in the format 'marlin', which is not read; read are"),
        ({"dynamic": {"+:.*down": {"bits": 8}}}, r"settings of its own for .* \(dynamic\)"),
    ],
)
def test_settings_that_are_not_read_are_refused(more: Any, said: str, tmp_path: Path) -> None:
    write_quantised(tmp_path, settings() | more, gptq(4, group=32))
    with pytest.raises(InputError, match=said) as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
