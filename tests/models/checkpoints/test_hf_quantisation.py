"""What a config.json may say of quantisation: any value is read, or refused by one line."""

from typing import Any

import pytest

from models.checkpoints.hf_quantisation import (
    quantisation_method,
    quantisation_notes,
    quantisation_settings,
)
from models.errors import InputError
from tests.support.compressed_settings import ints

ABSURD = [None, True, False, 0, -1, 3, 2.5, "", "x", [], [1], ["re:("], {}, {"a": 1}, {"a": {}}]
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
WEIGHTS |= {"block_structure": [8, 8]}
METHODS: dict[str, dict[str, Any]] = {
    "fp8": {"weight_block_size": [8, 8], "activation_scheme": "dynamic"},
    "compressed-tensors": ints(4, 32)
    | {"sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None},
    "gptq": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "dynamic": {}}
    | {"checkpoint_format": "gptq", "is_marlin_format": False},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "backend": "autoawq"},
}


def read(settings: Any, key: str = "quantization_config") -> None:
    """Read settings as a folder's are read; InputError is one line that says where."""
    said = "config.json: "
    try:
        found = quantisation_settings({key: settings})
        if found is not None:
            quantisation_notes(found)
            quantisation_method(found).layout("model.layers.0.mlp.up_proj")
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert said.startswith("config.json: ")


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_that_the_others_vary_are_read(name: str) -> None:
    settings = {"quant_method": name} | METHODS[name]
    assert quantisation_method(settings).layout("model.layers.0.mlp.up_proj").said


@pytest.mark.parametrize("name", METHODS)
def test_any_value_is_read_or_refused(name: str) -> None:
    for key in ("quant_method", *METHODS[name]):
        for value in ABSURD:
            read({"quant_method": name} | METHODS[name] | {key: value})


@pytest.mark.parametrize("key", ["targets", "weights", "format", "input_activations"])
def test_any_group_is_read_or_refused(key: str) -> None:
    for value in ABSURD:
        settings = ints(4, 32)
        settings["config_groups"]["group_0"][key] = value
        read(settings)


@pytest.mark.parametrize("key", WEIGHTS)
def test_any_weights_are_read_or_refused(key: str) -> None:
    for value in ABSURD:
        for strategy in ("group", "block", "channel", "tensor"):
            settings = ints(4, 32)
            group = settings["config_groups"]["group_0"]
            group["weights"] = WEIGHTS | {"strategy": strategy} | {key: value}
            read(settings)


@pytest.mark.parametrize("value", ABSURD)
def test_any_settings_are_read_or_refused(value: Any) -> None:
    for key in ("quantization_config", "compression_config"):
        read(value, key)


def test_the_older_name_is_read() -> None:
    settings = ints(4, 32)
    assert quantisation_settings({"compression_config": settings}) == settings
    assert quantisation_settings({}) is None


def test_methods_that_are_not_read_are_told_of_those_that_are() -> None:
    for name in ("bitsandbytes", "modelopt", "mxfp4", "quark", "torchao"):
        with pytest.raises(InputError, match=f"'{name}'.* read are: fp8, compressed-tensors, gptq"):
            quantisation_method({"quant_method": name})
