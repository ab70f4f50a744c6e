"""What a Hugging Face config.json says of single layers: sliding windows, and RoPE or none."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.checkpoints.hf_numbers import integer_in
from models.errors import InputError
from models.families import Family, WindowRule, layers_with_rope

_LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_layers(
    config: Mapping[str, Any], family: Family, num_layers: int
) -> tuple[bool, ...] | None:
    """Give for each layer whether it has RoPE, or None where all have it.

    `no_rope_layers`, 1 for each layer that has it and 0 for others, goes before
    `no_rope_layer_interval`. Settings that are not the family's own are not read here.

    Raises:
      InputError: a value that makes no sense.
    """
    given = config.get("no_rope_layers") if "no_rope_layers" in family.own_settings else None
    if given is not None:
        if not isinstance(given, list) or any(value not in (0, 1) for value in given):
            raise InputError(
                f"config.json: no_rope_layers is {reprlib.repr(given)}; expected a list of 0 (no "
                "RoPE) and 1"
            )
        if len(given) < num_layers:
            raise InputError(
                f"config.json: no_rope_layers names {len(given)} layers; expected {num_layers}"
            )
        layers = tuple(map(bool, given[:num_layers]))
        return None if all(layers) else layers
    interval = family.no_rope_interval
    if "no_rope_layer_interval" in family.own_settings:
        interval = integer_in(config, "no_rope_layer_interval", interval)
        if interval < 1:
            raise InputError(
                f"config.json: no_rope_layer_interval is {interval}; expected 1 or more"
            )
    return layers_with_rope(num_layers, interval)


def sliding_window(
    config: Mapping[str, Any],
    family: Family,
    num_layers: int,
    with_rope: tuple[bool, ...] | None,
) -> int | None:
    """Give the window in tokens, or None where no layer slides one.

    Args:
      config: the parsed config.json.
      family: the model's.
      num_layers: its layers.
      with_rope: what `rope_layers` gives.

    Raises:
      InputError: an unknown type of layer, or a value that makes no sense.
    """
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise InputError(
            f"config.json: layer_types is {reprlib.repr(layer_types)}; expected a list of names"
        )
    unknown = sorted({str(kind) for kind in layer_types if kind not in _LAYER_TYPES})
    if unknown:
        raise InputError(f"config.json: layer_types {unknown} are not supported")
    window = config.get("sliding_window", family.default_window)
    if family.window_rule is WindowRule.EVERY_LAYER:
        slides = True
    elif family.window_rule is WindowRule.NAMED_LAYERS:
        slides = "sliding_attention" in layer_types
    elif not config.get("use_sliding_window", False):
        slides = False
    elif layer_types:
        slides = "sliding_attention" in layer_types
    elif family.window_rule is WindowRule.UPPER_LAYERS:
        slides = integer_in(config, "max_window_layers", 28) < num_layers
    else:
        slides = with_rope is not None
    return integer_in({"sliding_window": window}, "sliding_window") if slides and window else None
