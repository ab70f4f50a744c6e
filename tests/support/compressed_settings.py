"""What config.json says of folders of compressed-tensors."""

from typing import Any


def settings(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """What config.json says; `weights` as of one group for all linear modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def ints(
    bits: int,
    group: Any,
    symmetric: bool = True,
    format: str = "pack-quantized",
    **more: Any,
) -> Any:
    """The same of integers, in groups of columns or by a strategy's name."""
    sizes = {"strategy": "group", "group_size": group} if group != "channel" else {}
    if isinstance(group, str):
        sizes = {"strategy": group, "group_size": None}
    return settings(format, num_bits=bits, type="int", symmetric=symmetric, **sizes, **more)
